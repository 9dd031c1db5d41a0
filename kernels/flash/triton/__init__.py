"""Hold the Triton kernels, which inline the generated functions."""
