"""A Gradio demo: python -m vpd_jax.demo. results.py implements the predictions, page.py the user interface."""
