"""Graph passes: an FX graph in, a graph or the specs of its attention sites out."""
