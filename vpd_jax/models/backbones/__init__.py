"""Public networks: Stable Diffusion's UNet and VAE encoder, CLIP. No paper-specific code."""
