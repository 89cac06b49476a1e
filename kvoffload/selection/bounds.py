"""``bounds``: per-channel minimum and maximum of each page, an upper bound of its largest logit (Quest,
arXiv:2406.10774, section 3.2)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvoffload.geometry import Geometry
from kvoffload.selection.base import Selector, SelectorConfigBase
from kvoffload.selection.digests import DigestSelector
from kvoffload.values import Pages


class BoundsSelectorConfig(SelectorConfigBase):
    """Page minima and maxima in the KV's own dtype."""

    kind: Literal["bounds"] = "bounds"
    holds: ClassVar[bool] = True

    def build(self, geometry: Geometry, device: torch.device) -> Selector:
        return BoundsSelector(device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return n_tokens // page_size * 2 * key_dim * itemsize


class BoundsSelector(DigestSelector):
    """The minimum and the maximum of each page."""

    n_digests = 2

    def digest(self, pages: Pages) -> tuple[Tensor, ...]:
        keys = pages.keys
        if pages.valid is None:
            return keys.amin(2), keys.amax(2)
        outside, big = ~pages.valid[..., None], torch.finfo(keys.dtype).max
        return keys.masked_fill(outside, big).amin(2), keys.masked_fill(outside, -big).amax(2)

    def score(self, query: Tensor) -> Tensor:
        low, high = (digest.float().transpose(-1, -2) for digest in self.digests)
        scores = query.clamp_min(0) @ high + query.clamp_max(0) @ low
        return scores if self.room is None else self.room.bound(scores)
