"""Conversion between external checkpoints and {name: array}."""
