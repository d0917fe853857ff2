"""Metric writers, profiler, cost of compiled programs, accelerators."""
