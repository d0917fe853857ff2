"""Scores of a data set, and the encoder cache."""
