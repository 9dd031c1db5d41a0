"""Express specs as calls of PyTorch's flex_attention operator."""
