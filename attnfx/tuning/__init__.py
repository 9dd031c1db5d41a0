"""Time candidates on the present device, and keep the times."""
