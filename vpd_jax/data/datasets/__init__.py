"""One file per data set; `DATASETS` in vpd_jax/experiment.py gives them their names in configs."""
