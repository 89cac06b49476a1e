"""The pages with the largest shares (kernels/README.md, "Top pages")."""
