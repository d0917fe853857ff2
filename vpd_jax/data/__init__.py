"""From files to batches: a source of Examples and its transforms per data set, and one pipeline for all of them."""
