"""``bounds``: per-channel minimum and maximum of each page, an upper bound of its largest logit (Quest,
arXiv:2406.10774, section 3.2)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvoffload.buffers import Growing, Room
from kvoffload.geometry import Geometry
from kvoffload.selection.base import Selector, SelectorConfigBase
from kvoffload.values import Pages


class BoundsSelectorConfig(SelectorConfigBase):
    """Page minima and maxima in the KV's own dtype."""

    kind: Literal["bounds"] = "bounds"
    holds: ClassVar[bool] = True

    def build(self, geometry: Geometry, device: torch.device) -> Selector:
        return BoundsSelector(device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return n_tokens // page_size * 2 * key_dim * itemsize


class BoundsSelector(Selector):
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset(torch.empty(0))

    def reset(self, anchor: Tensor) -> None:
        self._low, self._high = Growing(), Growing()
        self._room: Room | None = None

    def absorb(self, pages: Pages) -> None:
        keys = pages.keys.to(self.device)
        outside = None if pages.valid is None else ~pages.valid.to(self.device)[..., None]
        big = torch.finfo(keys.dtype).max
        self._low.append((keys if outside is None else keys.masked_fill(outside, big)).amin(2))
        self._high.append((keys if outside is None else keys.masked_fill(outside, -big)).amax(2))

    def score(self, query: Tensor) -> Tensor:
        high, low = self._high.view.float(), self._low.view.float()
        scores = query.clamp_min(0) @ high.transpose(-1, -2) + query.clamp_max(0) @ low.transpose(-1, -2)
        return scores if self._room is None else self._room.bound(scores)

    @property
    def can_hold(self) -> bool:
        return len(self._low) > 0

    def hold(self, room: Room | None) -> None:
        self._room = room
        for buffer in (self._low, self._high):
            buffer.hold(None if room is None else room.n_pages)

    @property
    def index_bytes(self) -> int:
        return self._low.used_bytes + self._high.used_bytes
