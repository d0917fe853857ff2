"""Where the tokens that the UNet attends to come from."""
