"""Generate the Triton functions of a score program and of its derivative."""
