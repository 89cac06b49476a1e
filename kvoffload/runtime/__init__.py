"""The runtime: sessions, and what the commands run."""
