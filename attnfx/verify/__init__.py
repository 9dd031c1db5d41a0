"""Compare each rewritten site with the original code."""
