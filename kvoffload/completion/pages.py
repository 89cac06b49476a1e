"""``pages``: the tilted sums of every page that was not fetched (kernels/README.md, "Completion"); grows with the
context.

Nothing has to be removed: a fetched page's own term is left out.
"""

from typing import Literal

import torch
from torch import Tensor

from kvoffload.completion.base import Completion
from kvoffload.completion.offset import OffsetsConfigBase
from kvoffload.geometry import Geometry
from kvoffload.page_sums import PageSums
from kvoffload.values import Fetched, Pages, Partial, by_row


class PagesCompletionConfig(OffsetsConfigBase):
    """Log mass, mean key and mean value of each page under the anchor, fp32; with calibrated offsets of their mass in
    ``file``."""

    kind: Literal["pages"] = "pages"

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return self.with_offsets(PagesCompletion(geometry.value_dim), layer, geometry, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return n_tokens // page_size * (key_dim + value_dim + 1) * 4


class PagesCompletion(Completion):
    uses_anchor = True

    def __init__(self, value_dim: int) -> None:
        self._value_dim = value_dim
        self._sums = PageSums(keep_values=True)

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        self._sums.reset(anchor)

    def absorb(self, pages: Pages) -> None:
        self._sums.absorb(pages)

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        if len(self._sums) == 0:
            return Partial.empty(query, self._value_dim)
        read = fetched.mask(query.shape[0], len(self._sums))
        masses = self._sums.log_masses(by_row(query, self._sums.values.shape[0])).view(*query.shape[:2], -1)
        return Partial.weigh(masses.masked_fill(read[:, None], -torch.inf), self._sums.values)

    @property
    def state_bytes(self) -> int:
        return self._sums.used_bytes
