"""``none``: what was not read is dropped, and the softmax renormalised over the rest (plain Top-K)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvoffload.completion.base import Completion, CompletionConfigBase
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial


class NoCompletionConfig(CompletionConfigBase):
    """Selection only."""

    kind: Literal["none"] = "none"
    holds: ClassVar[bool] = True

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return NoCompletion(geometry.value_dim)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return 0


class NoCompletion(Completion):
    reads_slices = False

    def __init__(self, value_dim: int) -> None:
        self._value_dim = value_dim

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        """There is no state."""

    def absorb(self, pages: Pages) -> None:
        """There is no state."""

    def put(self, page: Pages) -> None:
        """There is no state."""

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        return Partial.empty(query, self._value_dim)

    def estimate_parts(self, query: Tensor, fetched: Fetched, scores: Tensor) -> None:
        return None

    @property
    def can_hold(self) -> bool:
        return True

    @property
    def state_bytes(self) -> int:
        return 0
