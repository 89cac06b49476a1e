"""Sealed pages of a layer on the device: those that are held there still, or streamed through it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvoffload.attention.layer import LayerCache
from kvoffload.cache.arrived import Traffic
from kvoffload.cache.packed import unpack_slices
from kvoffload.values import Pages

_BLOCK_TOKENS = 4096
_BLOCK_ROW_TOKENS = 1 << 17  # on a GPU, where a block's launches cost more than its memory


def stream(layer: LayerCache, traffic: Traffic | None = None) -> Iterator[Pages]:
    """The sealed pages of a layer in order, in blocks, with their padding known; prefill traffic where none is
    given."""
    first, block = 0, _block_pages(layer)
    if layer.held is not None:
        yield from (_held(layer, i, min(block, layer.n_pages - i)) for i in range(0, layer.n_pages, block))
        return
    for pages in layer.fetch.stream(block, traffic):
        yield _padded(layer, first, pages)
        first += pages.n_pages


def read_keys(layer: LayerCache, runs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
    """Keys [rows, n, D] of several runs of sealed pages (first page, how many) side by side, as prefill traffic, and
    which of these tokens count, bool [rows, n] (None: all)."""
    masks = [layer.anchors.run_valid(*run) for run in runs]
    valid = None if masks[0] is None else torch.cat([mask.flatten(1) for mask in masks if mask is not None], 1)
    if layer.held is None:  # a run is valid until the next one is asked for
        read = (layer.fetch.ask_pages(*run, layer.fetch.prefill)().keys.flatten(1, 2).clone() for run in runs)
        return torch.cat(list(read), 1), valid
    held = torch.cat([layer.held[first : first + n_pages] for first, n_pages in runs])
    return unpack_slices(held, layer.geometry)[0].transpose(0, 1).flatten(1, 2), valid


def _block_pages(layer: LayerCache) -> int:
    on_gpu = layer.anchors.keys.is_cuda
    n_tokens = max(_BLOCK_ROW_TOKENS // layer.geometry.rows, _BLOCK_TOKENS) if on_gpu else _BLOCK_TOKENS
    return max(n_tokens // layer.geometry.page_size, 1)


def _held(layer: LayerCache, first: int, n_pages: int) -> Pages:
    """Views in the store's own layout, so that what is made of them is the same to the bit."""
    assert layer.held is not None
    keys, values = unpack_slices(layer.held[first : first + n_pages], layer.geometry)
    return _padded(layer, first, Pages(keys.transpose(0, 1), values.transpose(0, 1), None))


def _padded(layer: LayerCache, first: int, pages: Pages) -> Pages:
    return Pages(pages.keys, pages.values, layer.anchors.run_valid(first, pages.n_pages))
