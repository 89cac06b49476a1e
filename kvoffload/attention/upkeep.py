"""Work that decode steps make due beside themselves, every so many generated tokens."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from kvoffload.attention.layer import LayerCache


class Upkeep(ABC):
    """One such work on one layer. It is told of every step that had pages, in order, and never changes what a step that
    is over has given."""

    resident_bytes: int = 0
    """Device bytes held between steps."""

    @abstractmethod
    def restart(self) -> None:
        """A prefill was summarised: forget the steps before it."""

    @abstractmethod
    def run_length(self, layer: "LayerCache", n_pages: int) -> int:
        """How many steps may come in one forward before this work changes what a step gives; at least 1. ``n_pages``
        will be sealed in them."""

    @abstractmethod
    def after_steps(self, layer: "LayerCache", query: Tensor) -> None:
        """Scaled queries fp32 [rows, Q, R, D] were attended to, as Q steps."""


class Rhythm:
    """Counts steps up to each multiple of ``every``, and says which queries are among the ``newest`` ones then."""

    def __init__(self, every: int, newest: int) -> None:
        self._every, self._newest = every, min(newest, every)
        self._n_steps = 0

    @property
    def left(self) -> int:
        """Steps to the next multiple, 1 to ``every``."""
        return self._every - self._n_steps % self._every

    @property
    def due(self) -> bool:
        return self._n_steps > 0 and self.left == self._every

    def count(self, query: Tensor) -> Tensor:
        """Count the steps of queries [rows, Q, ...] (Q <= ``left``); those to be kept for the next multiple, [rows, n,
        ...], n may be 0."""
        left = self.left
        self._n_steps += query.shape[1]
        return query[:, max(left - self._newest, 0) :]
