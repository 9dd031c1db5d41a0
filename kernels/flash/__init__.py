"""The flash tier: Triton kernels that inline a generated score program. Submodules are imported only with Triton."""
