"""Diffusion backbones for visual perception, in JAX."""
