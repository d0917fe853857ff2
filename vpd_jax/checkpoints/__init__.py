"""Checkpoints of runs, and where the initial weights come from."""
