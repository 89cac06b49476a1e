"""``uniform``: pages spread evenly over the context whatever the query is; the control that every selector must
beat."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvoffload.geometry import Geometry
from kvoffload.selection.base import Selector, SelectorConfigBase
from kvoffload.selection.digests import DigestSelector
from kvoffload.values import Pages

_GOLDEN = 0.6180339887498949
_FAR = 1e4


class UniformSelectorConfig(SelectorConfigBase):
    """No index at all."""

    kind: Literal["uniform"] = "uniform"
    holds: ClassVar[bool] = True

    def build(self, geometry: Geometry, device: torch.device) -> Selector:
        return UniformSelector(device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return 0


class UniformSelector(DigestSelector):
    """Ranks pages by the golden-ratio sequence, whose first K terms are spread evenly for every K.

    The ranks are scaled far beyond any log mass, so that neither anchors nor heads weigh in. Tokens are counted only to
    tell pages of padding, and where no page is none count; no selector needs that for anything else.
    """

    def digest(self, pages: Pages) -> tuple[Tensor, ...]:
        return (pages.counts(),)

    def score(self, query: Tensor) -> Tensor:
        (counts,) = self.digests
        rank = (torch.arange(counts.shape[1], device=query.device, dtype=torch.float64) * _GOLDEN).frac().float()
        scores = (_FAR * rank).expand_as(counts).masked_fill(counts == 0, -torch.inf)
        return scores[:, None].expand(-1, query.shape[1], -1)

    @property
    def index_bytes(self) -> int:
        return 0
