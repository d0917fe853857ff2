"""Conversion tables, one per checkpoint format."""
