"""``kvoffload bench``: the ceilings of this machine, our figures, and peers measured beside them in one process."""
