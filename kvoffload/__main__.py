"""``python -m kvoffload`` is the command line."""

from kvoffload.cli import main

main()
