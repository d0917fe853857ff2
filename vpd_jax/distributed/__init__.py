"""Sharding, several processes, preemption."""
