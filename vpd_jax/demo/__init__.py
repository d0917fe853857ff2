"""A page to drop a picture on: python -m vpd_jax.demo. Its modules: results.py, what it does; page.py, how it looks."""
