"""Sealed pages of a layer, streamed through the device."""

from collections.abc import Iterator

from kvoffload.attention.layer import LayerCache
from kvoffload.cache.fetch import Traffic
from kvoffload.values import Pages

_BLOCK_TOKENS = 4096


def stream(layer: LayerCache, traffic: Traffic | None = None) -> Iterator[Pages]:
    """The sealed pages of a layer in order, in blocks, with their padding known; prefill traffic where none is
    given."""
    first = 0
    for pages in layer.fetch.stream(max(_BLOCK_TOKENS // layer.geometry.page_size, 1), traffic):
        yield Pages(pages.keys, pages.values, layer.anchors.run_valid(first, pages.n_pages))
        first += pages.n_pages
