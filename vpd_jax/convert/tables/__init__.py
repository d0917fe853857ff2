"""Tables of names: one per kind of checkpoint."""
