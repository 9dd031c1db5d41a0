"""Launch the Triton kernels: tiles, lists of live tiles, parameters, and fallbacks."""
