"""Referring segmentation."""
