"""One request on its way through the scheduler, and what comes back from it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from kvoffload.config import SamplingConfig
from kvoffload.runtime.events import Progress
from kvoffload.runtime.layer_figures import LayerFigures
from kvoffload.runtime.stats import Stats
from kvoffload.server.errors import Failure
from kvoffload.server.room import Room
from kvoffload.server.stored import Stored


@dataclass(frozen=True)
class Piece:
    """Text that became certain with one token; it may be empty. ``layers`` say what the token's step did, if that is
    wanted."""

    text: str
    layers: LayerFigures | None = None


@dataclass(frozen=True)
class Done:
    """The answer is whole."""

    finish: Literal["stop", "length"]
    new_tokens: int
    cached_tokens: int
    stats: Stats
    stored: Stored | None = None


@dataclass(frozen=True)
class Queued:
    """So many requests go first."""

    position: int


Event = Piece | Done | Failure | Progress | Queued


@dataclass(eq=False)
class Job:
    """What is wanted, and where events go: ``send`` is called by the scheduler's threads and must not block.
    ``store_as`` is the name under which the session is stored when the answer is whole.

    ``cancel`` may be called by any thread and as often as wanted; the scheduler drops the job before its next step.
    A job ends with one Done or one Failure, unless it was cancelled.
    """

    id: str
    prompt: list[int]
    sampling: SamplingConfig
    need: Room
    send: Callable[[Event], None]
    budget: str | int | None = None
    store_as: str | None = None
    with_layers: bool = False
    deadline_s: float | None = None
    arrived_s: float = field(default_factory=time.monotonic)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def late(self) -> bool:
        return self.deadline_s is not None and time.monotonic() > self.deadline_s
