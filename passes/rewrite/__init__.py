"""Replace matches by calls of attnfx operators, and cut sites out of a graph for a comparison."""
