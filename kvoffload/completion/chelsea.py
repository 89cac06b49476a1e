"""``chelsea``: Chelsea / CentroidKV (arXiv:2506.11418): size-weighted centroids from chunked soft matching.

Built from the abstracts and two digests. A chunk's entries are split alternately into A and B, each of A is linked to
the most similar of B (cosine of keys), the strongest links are merged, and so again until ``centroids`` are left; an
entry's logit gets the log of its size. Filled in: the chunk is a page, so that centroids go with their page; keys are
rotated ones; sinks and the recent window stay exact. As a mean key has at most the mean mass (Jensen), the estimated
mass never exceeds the true one.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvoffload.completion.base import Completion, CompletionConfigBase
from kvoffload.completion.page_entries import Entries, PageEntriesCompletion, entry_bytes
from kvoffload.geometry import Geometry
from kvoffload.values import Pages


class ChelseaCompletionConfig(CompletionConfigBase):
    """``centroids`` of each page, fp32."""

    kind: Literal["chelsea"] = "chelsea"
    centroids: int = Field(2, ge=1)

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return ChelseaCompletion(min(self.centroids, geometry.page_size), geometry)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return entry_bytes(n_tokens, page_size, min(self.centroids, page_size), key_dim, value_dim)


class ChelseaCompletion(PageEntriesCompletion):
    def __init__(self, n_centroids: int, geometry: Geometry) -> None:
        self._n_centroids, self._geometry = n_centroids, geometry
        super().__init__(geometry.value_dim)

    def make(self, pages: Pages) -> Entries:
        tokens = torch.cat([pages.log_valid().exp()[..., None], pages.keys.float(), pages.values.float()], -1)
        tokens[..., 1:] *= tokens[..., :1]
        sums = soft_matching(tokens.flatten(0, 1), self._n_centroids, self._geometry.key_dim)
        sums = sums.unflatten(0, pages.keys.shape[:2])
        sizes = sums[..., 0]
        means = sums[..., 1:] / sizes.clamp_min(1)[..., None]
        keys, values = means.split([self._geometry.key_dim, self._geometry.value_dim], -1)
        return Entries(keys, values, sizes.log())


def soft_matching(sums: Tensor, n_left: int, key_dim: int) -> Tensor:
    """Merge entries of each chunk until ``n_left`` are left: sums over an entry's tokens of (1, k, v), fp32 [chunks, N,
    1 + D + Dv]. Linear in the number of chunks; entries stay in order."""
    while sums.shape[1] > n_left:
        sums = _merge_round(sums, n_left, key_dim)
    return sums


def _merge_round(sums: Tensor, n_left: int, key_dim: int) -> Tensor:
    a, b = sums[:, 0::2], sums[:, 1::2]
    keys_a, keys_b = (torch.nn.functional.normalize(t[..., 1 : 1 + key_dim], dim=-1) for t in (a, b))
    likeness, partner = (keys_a @ keys_b.mT).max(-1)
    n_merged = min(sums.shape[1] - n_left, a.shape[1])
    order = likeness.argsort(dim=1, descending=True)
    merged, kept = order[:, :n_merged], order[:, n_merged:]
    width = sums.shape[-1]
    target = partner.gather(1, merged)[..., None].expand(-1, -1, width)
    b = b.scatter_add(1, target, a.gather(1, merged[..., None].expand(-1, -1, width)))
    a = a.gather(1, kept[..., None].expand(-1, -1, width))
    places = torch.arange(b.shape[1], device=sums.device).mul(2).add(1).expand(b.shape[:2])
    in_order = torch.cat([kept * 2, places], 1).argsort(dim=1)
    return torch.cat([a, b], 1).gather(1, in_order[..., None].expand(-1, -1, width))
