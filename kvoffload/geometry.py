"""Sizes and shapes of one layer's KV, computed in this one place.

Shape letters: B sequences, G kv heads, rows = B * G, R query heads a kv head, D key size, Dv value size, S tokens a
page, P pages, M segments, F selected slices, A anchor places.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Geometry:
    """One attention layer as the runtime sees it."""

    n_sequences: int
    n_kv_heads: int
    group_size: int
    key_dim: int
    value_dim: int
    page_size: int
    dtype: torch.dtype
    scale: float
    softcap: float | None = None

    @property
    def rows(self) -> int:
        return self.n_sequences * self.n_kv_heads

    @property
    def token_bytes(self) -> int:
        """One token-equivalent: K and V of one token and kv head."""
        return (self.key_dim + self.value_dim) * self.dtype.itemsize

    @property
    def slice_bytes(self) -> int:
        """K and V of one page and kv head: the unit of a hot read."""
        return self.page_size * self.token_bytes
