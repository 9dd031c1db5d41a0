"""Call the fused attention that PyTorch ships, for the programs that it can express."""
