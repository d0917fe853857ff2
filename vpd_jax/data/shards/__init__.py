"""ArrayRecord shards of tensorflow-datasets: reading and writing."""
