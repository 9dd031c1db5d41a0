"""Query, copy and clean up FX graphs: nodes, memory, mutation, dead code, FLOPs, graph breaks."""
