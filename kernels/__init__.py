"""Executors: the spec of an attention site in, tensors out."""
