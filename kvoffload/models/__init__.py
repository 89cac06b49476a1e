"""Models: where they come from, and the transformers seam."""
