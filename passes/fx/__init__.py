"""Ask questions about FX graphs: nodes, memory, mutation, dead code, operations, graph breaks."""
