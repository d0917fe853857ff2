"""Data sets, one module each; `DATASETS` in vpd_jax/experiment.py maps config names to them."""
