"""Slices of a step, as attention gets them, and what moved for them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from kvoffload_storage.store import Moved
from torch import Tensor

from kvoffload.values import Selection


@dataclass
class Traffic:
    """Bytes that crossed from a slow tier to the compute device in one phase: ``moved`` as the host knows it, less what
    the device finds not to move (``spared``: hits of its page cache)."""

    moved: Moved = field(default_factory=Moved)
    spared: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    def total(self) -> Moved:
        """Both counts together; waits for the device."""
        return self.moved + Moved(cpu=-int(self.spared))


@dataclass(frozen=True)
class Arrived:
    """Slices that came, on the device: all of ``data`` uint8 [F, slice_bytes], or with ``places`` int64 [F] those
    among data [C, slice_bytes]."""

    selection: Selection
    data: Tensor
    places: Tensor | None = None


Arrival = Callable[[], Arrived]
"""Slices of a step: the call waits if it must, and gives those that came."""
