"""Asking early: when a step begins, every layer's likely pages are asked for at once, so that the first layers' work
hides the reads of the later ones.

A layer's likely pages are those of its last step and the next best of that step's scores. They only move between a slow
tier and the tier before it; what a step attends to does not depend on them.
"""

from collections.abc import Callable

from kvoffload.cache.fetch import Fetch
from kvoffload.values import Selection


class Prefetch:
    """The guesses of all layers of one cache. ``share`` is how much more than the budget a guess holds."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._guesses: dict[Fetch, Selection] = {}

    def expect(self, fetch: Fetch, guess: Callable[[], Selection]) -> None:
        """What the next step of this layer will probably select."""
        if self.share > 0:
            self._guesses[fetch] = guess()

    def begin(self) -> None:
        """A step begins: ask for all guesses, those of the first layers first; each is asked for once."""
        guesses, self._guesses = self._guesses, {}
        for fetch, selection in guesses.items():
            fetch.ahead(selection)
