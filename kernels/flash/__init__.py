"""The flash tier: Triton kernels that inline a generated score program. Nothing here is imported without Triton."""
