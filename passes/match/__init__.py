"""Find the attentions of a prepared graph, or say why a place is none."""
