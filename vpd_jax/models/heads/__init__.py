"""Features to Outputs."""
