"""Read and mark the joint graphs of AOTAutograd, for plans and memory budgets."""
