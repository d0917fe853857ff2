"""Augmentation and preprocessing on the host, in numpy and OpenCV."""
