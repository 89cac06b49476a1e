"""Choosing early: a layer's pages are chosen, and begin to move, while the layer before it computes.

The choice is made by a guess of the layer's query (models/ahead.py), and it is final: no page is read for nothing, and
what a wrong guess leaves out is in the remainder, which the completion estimates for the true query. InfiniGen
(arXiv:2406.19707, section 4.3) speculates alike: a layer's input is close to that of the layer before it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvoffload.cache.arrived import Arrival

if TYPE_CHECKING:
    from kvoffload.attention.layer import LayerCache


Choice = tuple[list[Arrival], Tensor]
"""Slices on their way, and the scores [rows * Q, R, P] of all pages that they were chosen by."""


@dataclass(frozen=True)
class Asked:
    """Guessed queries of a layer, scaled, fp32 [rows * Q, R, D], and what was chosen by them, if anything was yet;
    ``event`` is behind that."""

    query: Tensor
    choice: Choice | None
    event: torch.cuda.Event | None


class LookAhead:
    """The early choices of one cache, each made before the last part of the layer before it.

    On a GPU the slices move on a stream of their own (``beside``), and the compute stream goes on behind them at
    ``take``. The choice itself is no part of it: small kernels would wait for room beside large ones. What was asked
    for is taken in the layer that follows, and is kept until something was asked for twice after it, behind which its
    memory, and the places that its slices landed in (``Staging``), can be used again.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._asked: dict[LayerCache, Asked] = {}
        self._kept: list[Asked] = []

    @contextmanager
    def beside(self, device: torch.device, *, waits: bool) -> Iterator[None]:
        """Inside this block slices are asked for that move beside what comes next; before it where the host ``waits``
        for them, as it does for files."""
        if waits or device.type != "cuda":
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._kept = self._kept[-1:]
        with torch.cuda.stream(self._stream):
            yield

    def keep(self, layer: "LayerCache", query: Tensor, choice: Choice | None) -> None:
        """A layer's slices were asked for, or will be."""
        event = None if choice is None or self._stream is None else self._stream.record_event()
        asked = self._asked[layer] = Asked(query, choice, event)
        self._kept.append(asked)

    def take(self, layer: "LayerCache") -> Asked | None:
        """What was asked for this layer, behind which the compute stream goes on; None where nothing was."""
        asked = self._asked.pop(layer, None)
        if asked is not None and asked.event is not None:
            torch.cuda.current_stream(asked.query.device).wait_event(asked.event)
        return asked
