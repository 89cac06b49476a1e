"""The sealing of a page in all layers of a cache whose steps have fixed shapes.

As a step, it has two parts. The device's finds the page and where it goes in tensors, and does the same for every page,
so that it can be replayed; layers that are alike are done together, as more rows. The host's counts, and appends to the
store what the device has packed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvoffload.attention.layer import LayerCache
from kvoffload.buffers import Room, write_range
from kvoffload.cache.packed import pack_pages
from kvoffload.completion.base import Completion
from kvoffload.repeats import Capture, Repeats
from kvoffload.rows import join, kind
from kvoffload.selection.base import Selector
from kvoffload.values import Pages


@dataclass(frozen=True)
class _Joined:
    """Layers that are alike, and what stands for the selectors and completions of all of them."""

    layers: Sequence[LayerCache]
    selector: Selector
    completion: Completion

    @classmethod
    def of(cls, layers: Sequence[LayerCache]) -> "_Joined":
        known: dict[int, object] = {}  # a completion may read the selector's index
        selector = join([layer.selector for layer in layers], known)
        return cls(layers, selector, join([layer.completion for layer in layers], known))

    def put(self, places: Tensor, tokens: Tensor) -> Tensor:
        """Take in the page in these places; it is given as the store has it, uint8 [layers, rows, slice_bytes]."""
        page = Pages.of_all([layer.anchors.page_at(places, tokens) for layer in self.layers])
        self.selector.put(page)
        self.completion.put(page)
        packed: Tensor = pack_pages(page).unflatten(1, (len(self.layers), -1))
        return packed[0]


class Sealing:
    """For layers that are held in the room, until something else is done to them. ``seal`` is called when all of them
    have counted a token that pushes a page out of the window, and the room that page."""

    def __init__(self, layers: Sequence[LayerCache], room: Room, capture: Capture | None) -> None:
        self._joined, self._room = [_Joined.of(alike) for alike in _alike(layers)], room
        self._places = torch.arange(room.page_size, device=room.tokens.device)
        self._repeats: Repeats[Tensor] = Repeats(capture)

    def seal(self, start: int) -> None:
        """Take in the page from the anchors' place ``start`` on."""
        write_range(self._places, start)
        layers = [layer for joined in self._joined for layer in joined.layers]
        for layer in layers:
            layer.selector.note()
            layer.completion.note()
        for layer, page in zip(layers, self._repeats.run("page", self._put).split(1), strict=True):
            layer.meter.written += layer.store.append(layer.layer, page)

    def _put(self) -> Tensor:
        """The device's part: every layer's page, uint8 [layers, rows, slice_bytes]."""
        return torch.cat([joined.put(self._places, self._room.tokens) for joined in self._joined])


def _alike(layers: Sequence[LayerCache]) -> Iterable[Sequence[LayerCache]]:
    found: dict[object, list[LayerCache]] = {}
    for layer in layers:
        found.setdefault((layer.geometry, kind(layer.selector), kind(layer.completion)), []).append(layer)
    return found.values()
