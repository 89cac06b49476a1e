"""What a session tells while it works."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """How far a prefill is; ``bytes_moved`` counts what went to and came from the tiers so far."""

    done_tokens: int
    total_tokens: int
    bytes_moved: int


@dataclass(frozen=True)
class StreamEvent:
    """One generated token and the text that became certain with it; the last one says why it is the last."""

    text: str
    token: int
    finish: Literal["stop", "length"] | None = None
