"""Sources of the tokens that the UNet attends to."""
