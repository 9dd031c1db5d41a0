"""Replace matches by calls of the operators of attnfx, and cut them out for a comparison."""
