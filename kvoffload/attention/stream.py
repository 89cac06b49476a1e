"""Sealed pages of a layer on the device: those that are held there still, or streamed through it."""

from collections.abc import Iterator

from kvoffload.attention.layer import LayerCache
from kvoffload.cache.fetch import Traffic, unpack_slices
from kvoffload.values import Pages

_BLOCK_TOKENS = 4096


def stream(layer: LayerCache, traffic: Traffic | None = None) -> Iterator[Pages]:
    """The sealed pages of a layer in order, in blocks, with their padding known; prefill traffic where none is
    given."""
    first, block = 0, max(_BLOCK_TOKENS // layer.geometry.page_size, 1)
    if layer.held is not None:
        yield from (_held(layer, i, min(block, layer.n_pages - i)) for i in range(0, layer.n_pages, block))
        return
    for pages in layer.fetch.stream(block, traffic):
        yield _padded(layer, first, pages)
        first += pages.n_pages


def read_run(layer: LayerCache, first: int, n_pages: int) -> Pages:
    """A run of sealed pages with their padding known, as prefill traffic; valid until the next one is asked for."""
    if layer.held is not None:
        return _held(layer, first, n_pages)
    return _padded(layer, first, layer.fetch.ask_pages(first, n_pages, layer.fetch.prefill)())


def _held(layer: LayerCache, first: int, n_pages: int) -> Pages:
    """Views in the store's own layout, so that what is made of them is the same to the bit."""
    assert layer.held is not None
    keys, values = unpack_slices(layer.held[first : first + n_pages], layer.geometry)
    return _padded(layer, first, Pages(keys.transpose(0, 1), values.transpose(0, 1), None))


def _padded(layer: LayerCache, first: int, pages: Pages) -> Pages:
    return Pages(pages.keys, pages.values, layer.anchors.run_valid(first, pages.n_pages))
