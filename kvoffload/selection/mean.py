"""``mean``: the mean key of each page, scored as if all its tokens had it (InfLLM-like block means)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvoffload.buffers import Growing, Room
from kvoffload.geometry import Geometry
from kvoffload.selection.base import Selector, SelectorConfigBase
from kvoffload.values import Pages


class MeanSelectorConfig(SelectorConfigBase):
    """Page means in fp32."""

    kind: Literal["mean"] = "mean"
    holds: ClassVar[bool] = True

    def build(self, geometry: Geometry, device: torch.device) -> Selector:
        return MeanSelector(device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return n_tokens // page_size * (key_dim + 1) * 4


class MeanSelector(Selector):
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset(torch.empty(0))

    def reset(self, anchor: Tensor) -> None:
        self._means, self._log_counts = Growing(), Growing()
        self._room: Room | None = None

    def absorb(self, pages: Pages) -> None:
        pages = pages.to(self.device)
        weights = pages.log_valid().exp()
        counts = weights.sum(-1)
        total = (weights[..., None, :] @ pages.keys.float())[..., 0, :]
        self._means.append(total / counts.clamp_min(1)[..., None])
        self._log_counts.append(counts.log())

    def score(self, query: Tensor) -> Tensor:
        scores = query @ self._means.view.transpose(-1, -2) + self._log_counts.view[:, None]
        return scores if self._room is None else self._room.bound(scores)

    @property
    def can_hold(self) -> bool:
        return len(self._means) > 0

    def hold(self, room: Room | None) -> None:
        self._room = room
        for buffer in (self._means, self._log_counts):
            buffer.hold(None if room is None else room.n_pages)

    @property
    def index_bytes(self) -> int:
        return self._means.used_bytes + self._log_counts.used_bytes
