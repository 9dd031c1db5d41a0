"""Time candidates on the device at hand, and keep the answers."""
