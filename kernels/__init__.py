"""Execute attention specs: compute the output tensors of one site from its spec and operands."""
