"""Input data, from files to batches: data sets with sources of Examples and transforms, and a common pipeline."""
