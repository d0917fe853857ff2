"""--mode=plan: memory and cost of a run before it starts."""
