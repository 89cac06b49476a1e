"""Pages as stores keep them, and slices of them as attention reads them."""

import torch
from torch import Tensor

from kvoffload.geometry import Geometry
from kvoffload.values import Pages


def pack_pages(pages: Pages) -> Tensor:
    """Sealed pages as the store keeps them, uint8 [P, rows, slice_bytes]: [page][row][K|V][S][D]."""
    keys, values = (t.transpose(0, 1).flatten(2).contiguous() for t in (pages.keys, pages.values))
    return torch.cat([keys, values], dim=2).view(torch.uint8)


def unpack_slices(data: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Views of slices uint8 [..., slice_bytes] as keys [..., S, D] and values [..., S, Dv]."""
    numbers, size = data.view(geometry.dtype), geometry.page_size
    keys, values = numbers.split([size * geometry.key_dim, size * geometry.value_dim], dim=-1)
    return keys.unflatten(-1, (size, geometry.key_dim)), values.unflatten(-1, (size, geometry.value_dim))
