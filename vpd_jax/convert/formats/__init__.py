"""File formats of foreign weights."""
