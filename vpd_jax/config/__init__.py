"""Config files and their presets."""
