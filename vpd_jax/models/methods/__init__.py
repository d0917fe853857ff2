"""Image and prompt to features, one file per paper."""
