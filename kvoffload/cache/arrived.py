"""Slices of a step, as attention gets them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvoffload.values import Selection


@dataclass(frozen=True)
class Arrived:
    """Slices that came, on the device: all of ``data`` uint8 [F, slice_bytes], or with ``places`` int64 [F] those
    among data [C, slice_bytes]."""

    selection: Selection
    data: Tensor
    places: Tensor | None = None


Arrival = Callable[[], Arrived]
"""Slices of a step: the call waits if it must, and gives those that came."""
