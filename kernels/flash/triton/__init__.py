"""The Triton kernels, which inline the generated functions."""
