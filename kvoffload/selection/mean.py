"""``mean``: the mean key of each page, scored as if all its tokens had it (InfLLM-like block means)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvoffload.geometry import Geometry
from kvoffload.selection.base import Selector, SelectorConfigBase
from kvoffload.selection.digests import DigestSelector
from kvoffload.values import Pages


class MeanSelectorConfig(SelectorConfigBase):
    """Page means in fp32."""

    kind: Literal["mean"] = "mean"
    holds: ClassVar[bool] = True

    def build(self, geometry: Geometry, device: torch.device) -> Selector:
        return MeanSelector(device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return n_tokens // page_size * (key_dim + 1) * 4


class MeanSelector(DigestSelector):
    """The mean of each page, and the log of the number of its tokens."""

    n_digests = 2

    def digest(self, pages: Pages) -> tuple[Tensor, ...]:
        weights = pages.log_valid().exp()
        counts = weights.sum(-1)
        total = (weights[..., None, :] @ pages.keys.float())[..., 0, :]
        return total / counts.clamp_min(1)[..., None], counts.log()

    def score(self, query: Tensor) -> Tensor:
        means, log_counts = self.digests
        scores = query @ means.transpose(-1, -2) + log_counts[:, None]
        return scores if self.room is None else self.room.bound(scores)
