"""Test-time algorithms, without config: augmentation, sliding windows, top-down pose, loading user images."""
