"""``uniform``: pages spread evenly over the context whatever the query is; the control that every selector must
beat."""

from typing import Literal

import torch
from torch import Tensor

from kvoffload.geometry import Geometry
from kvoffload.selection.base import Selector, SelectorConfigBase
from kvoffload.values import Pages

_GOLDEN = 0.6180339887498949


class UniformSelectorConfig(SelectorConfigBase):
    """No index at all."""

    kind: Literal["uniform"] = "uniform"

    def build(self, geometry: Geometry, device: torch.device) -> Selector:
        return UniformSelector(device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return 0


class UniformSelector(Selector):
    """Ranks pages by the golden-ratio sequence, whose first K terms are spread evenly for every K."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._n_pages = 0

    def reset(self, anchor: Tensor) -> None:
        self._n_pages = 0

    def absorb(self, pages: Pages) -> None:
        self._n_pages += pages.n_pages

    def score(self, query: Tensor) -> Tensor:
        rank = (torch.arange(self._n_pages, device=query.device, dtype=torch.float64) * _GOLDEN).frac()
        return rank.float().expand(*query.shape[:2], -1)

    @property
    def index_bytes(self) -> int:
        return 0
