"""``uniform``: pages spread evenly over the context whatever the query is; the control that every selector must
beat."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvoffload.buffers import Growing, Room
from kvoffload.geometry import Geometry
from kvoffload.selection.base import Selector, SelectorConfigBase
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


class UniformSelector(Selector):
    """Ranks pages by the golden-ratio sequence, whose first K terms are spread evenly for every K.

    The ranks are scaled far beyond any log mass, so that neither anchors nor heads weigh in.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset(torch.empty(0))

    def reset(self, anchor: Tensor) -> None:
        self._counts = Growing()  # only to tell pages of padding; no selector needs it for anything else

    def absorb(self, pages: Pages) -> None:
        self._counts.append(pages.counts().to(self.device))

    def score(self, query: Tensor) -> Tensor:
        counts = self._counts.view
        rank = (torch.arange(counts.shape[1], device=query.device, dtype=torch.float64) * _GOLDEN).frac().float()
        scores = (_FAR * rank).expand_as(counts).masked_fill(counts == 0, -torch.inf)
        return scores[:, None].expand(-1, query.shape[1], -1)

    @property
    def can_hold(self) -> bool:
        return len(self._counts) > 0

    def hold(self, room: Room | None) -> None:
        self._counts.hold(None if room is None else room.n_pages)  # where no page is, no token counts

    @property
    def index_bytes(self) -> int:
        return 0
