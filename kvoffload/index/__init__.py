"""Token-level indexes: approximate keys at a few bits a channel, which selectors score and completions may read."""
