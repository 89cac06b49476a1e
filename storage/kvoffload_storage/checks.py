"""What every store demands of its arguments; a violation is the caller's bug (ValueError, IndexError)."""

import torch
from torch import Tensor

from .store import StoreShape


def check_pages(shape: StoreShape, pages: Tensor) -> None:
    """Pages to append: uint8 [n, n_slices, slice_bytes]."""
    _check_bytes("pages", pages, (len(pages), shape.n_slices, shape.slice_bytes))


def check_slice_read(shape: StoreShape, n_pages: int, page_ids: Tensor, slice_ids: Tensor, out: Tensor) -> None:
    """Ids int64 [n] inside the layer, and a contiguous uint8 [n, slice_bytes] to fill."""
    _check_out(out, (len(page_ids), shape.slice_bytes))
    _check_ids("page", page_ids, n_pages)
    _check_ids("slice", slice_ids, shape.n_slices)
    if len(page_ids) != len(slice_ids):
        raise ValueError(f"{len(page_ids)} page ids and {len(slice_ids)} slice ids, expected as many of each")


def check_page_read(shape: StoreShape, n_pages: int, first: int, out: Tensor) -> None:
    """A run of pages inside the layer, and a contiguous uint8 [n, n_slices, slice_bytes] to fill."""
    _check_out(out, (len(out), shape.n_slices, shape.slice_bytes))
    if not 0 <= first <= first + len(out) <= n_pages:
        raise IndexError(f"pages {first} to {first + len(out)} (exclusive), the layer has {n_pages}")


def _check_out(out: Tensor, expected: tuple[int, ...]) -> None:
    _check_bytes("out", out, expected)
    if not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}, expected contiguous memory")


def _check_bytes(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.dtype != torch.uint8 or tuple(tensor.shape) != expected:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected torch.uint8 {list(expected)}")


def _check_ids(name: str, ids: Tensor, count: int) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"{name} ids are {ids.dtype} {list(ids.shape)}, expected torch.int64 [n]")
    if not len(ids):
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= count:
        raise IndexError(f"{name} ids from {low} to {high}, expected 0 to {count - 1}")
