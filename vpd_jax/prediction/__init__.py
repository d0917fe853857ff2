"""Prediction for images of any size, in Python and as files."""
