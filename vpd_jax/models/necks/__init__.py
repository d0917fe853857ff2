"""Features to Features: what stands between a method and a head."""
