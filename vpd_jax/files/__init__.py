"""File utilities: reading, image decoding, atomic writing, detection of damaged files."""
