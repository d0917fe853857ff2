"""Files of users and of runs: reading, decoding, writing in one piece, what counts as damage."""
