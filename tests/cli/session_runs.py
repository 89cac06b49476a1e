"""Command lines of ``generate`` on the ``tiny`` model for tests of sessions."""

TINY = ["generate", "--model", "tiny", "--offload", "nvme", "--page-size", "4", "--recent", "8", "--json", "--quiet"]
ONCE, SOME = ([*TINY, "--max-new-tokens", n] for n in ("3", "24"))
LONG = "a book of pages " * 12
