"""The expression IR: score programs as scalar functions of indices. Depends only on the standard library."""
