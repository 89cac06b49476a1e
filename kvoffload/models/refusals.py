"""What the stock ``generate`` may ask of a cache and ours cannot do, refused by name instead of answered wrongly."""

from typing import Any, NoReturn

from kvoffload.errors import UsageError


class OneSequenceARow:
    """A row of the cache follows one sequence, token by token: sealed pages are never copied, reordered or undone."""

    def reorder_cache(self, beam_idx: Any) -> NoReturn:
        raise UsageError("num_beams > 1 is not supported: sealed pages are never copied or reordered")

    def activate_past_recording(self) -> NoReturn:
        """Asked by whoever feeds guesses that it takes back."""
        raise UsageError(
            "assisted decoding and prompt lookup are not supported: guesses that are refused may be sealed already"
        )
