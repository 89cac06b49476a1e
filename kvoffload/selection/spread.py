"""``spread``: page mean plus two pooled standard deviations of the page's logits ("mean+2sd").

The within-page covariance of the keys is pooled over the pages of a row; a page keeps one scalar beside its mean.
"""

from typing import Literal

import torch
from torch import Tensor

from kvoffload.buffers import Growing, tensor_bytes
from kvoffload.geometry import Geometry
from kvoffload.selection.base import Selector, SelectorConfigBase
from kvoffload.selection.mean import MeanSelector
from kvoffload.values import Pages


class SpreadSelectorConfig(SelectorConfigBase):
    """``deviations`` standard deviations are added to the page mean's score."""

    kind: Literal["spread"] = "spread"
    deviations: float = 2.0

    def build(self, geometry: Geometry, device: torch.device) -> Selector:
        return SpreadSelector(self.deviations, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return n_tokens // page_size * (key_dim + 2) * 4 + key_dim * key_dim * 4


class SpreadSelector(Selector):
    def __init__(self, deviations: float, device: torch.device) -> None:
        self.device = device
        self._deviations = deviations
        self._mean = MeanSelector(device)
        self.reset(torch.empty(0))

    def reset(self, anchor: Tensor) -> None:
        self._mean.reset(anchor)
        self._scatter: Tensor | None = None  # [rows, D, D], summed over tokens
        self._spread = Growing()  # mean squared distance from the page mean

    def absorb(self, pages: Pages) -> None:
        pages = pages.to(self.device)
        self._mean.absorb(pages)
        weights = pages.log_valid().exp()[..., None]
        counts = weights.sum((-1, -2)).clamp_min(1)
        keys = pages.keys.float()
        centred = (keys - (weights * keys).sum(2, keepdim=True) / counts[..., None, None]) * weights
        scatter = torch.einsum("gpsd,gpse->gde", centred, centred)
        self._scatter = scatter if self._scatter is None else self._scatter + scatter
        self._spread.append(centred.square().sum((2, 3)) / counts)

    def score(self, query: Tensor) -> Tensor:
        assert self._scatter is not None, "score is called only when there are pages"
        trace = self._scatter.diagonal(dim1=1, dim2=2).sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        shape = torch.einsum("grd,gde,gre->gr", query, self._scatter, query) / trace[:, None]
        variance = shape[..., None] * self._spread.view[:, None]
        return self._mean.score(query) + self._deviations * variance.clamp_min(0).sqrt()

    @property
    def index_bytes(self) -> int:
        scatter = 0 if self._scatter is None else tensor_bytes(self._scatter)
        return self._mean.index_bytes + self._spread.used_bytes + scatter
