"""Necks: modules between a method and a head."""
