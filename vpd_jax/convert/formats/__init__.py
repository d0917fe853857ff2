"""Readers and writers of external weight formats."""
