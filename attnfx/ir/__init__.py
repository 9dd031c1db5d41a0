"""The expression IR: score programs as scalar functions of indices. Depends on the standard library alone."""
