"""``anchored``: page means weighted by e^(q0 . k), q0 the prefill's mean query (kernels/README.md, "Completion")."""

from typing import Literal

import torch
from torch import Tensor

from kvoffload.geometry import Geometry
from kvoffload.page_sums import PageSums
from kvoffload.selection.base import Selector, SelectorConfigBase
from kvoffload.values import Pages


class AnchoredSelectorConfig(SelectorConfigBase):
    """Log mass and mean key of each page under the anchor, fp32."""

    kind: Literal["anchored"] = "anchored"

    def build(self, geometry: Geometry, device: torch.device) -> Selector:
        return AnchoredSelector(device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return n_tokens // page_size * (key_dim + 1) * 4


class AnchoredSelector(Selector):
    uses_anchor = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums = PageSums(keep_values=False)

    def reset(self, anchor: Tensor) -> None:
        self._sums.reset(anchor.to(self.device))

    def absorb(self, pages: Pages) -> None:
        self._sums.absorb(pages.to(self.device))

    def score(self, query: Tensor) -> Tensor:
        return self._sums.log_masses(query)

    @property
    def index_bytes(self) -> int:
        return self._sums.used_bytes
