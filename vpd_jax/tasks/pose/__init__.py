"""Keypoints."""
