"""kvoffload eval: lm-evaluation-harness over the runtime. Importing this registers nothing; ``model`` does."""
