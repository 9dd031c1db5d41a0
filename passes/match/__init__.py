"""Match the attentions of a prepared graph, or refuse a site with a reason."""
