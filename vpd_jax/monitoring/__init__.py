"""Progress of commands, metric writers, profiler, cost of compiled programs, accelerators."""
