"""Outputs and Batch to loss, prediction, measurements and scores."""
