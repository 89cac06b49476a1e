"""The sealing of a page in all layers of a cache whose steps have fixed shapes.

As a step, it has two parts. The device's finds the page and where it goes in tensors, and does the same for every page,
so that it can be replayed; the host's counts, and appends to the store what the device has packed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvoffload.attention.layer import LayerCache
from kvoffload.attention.repeats import Capture, Repeats
from kvoffload.buffers import Room, write_range
from kvoffload.cache.fetch import pack_pages


class Sealing:
    """``seal`` is called when all layers have counted a token that pushes a page out of the window; whoever gives the
    layers room counts the page there before."""

    def __init__(self, layers: Sequence[LayerCache], capture: Capture | None) -> None:
        self._layers = layers
        self._places = torch.arange(layers[0].geometry.page_size, device=layers[0].anchors.keys.device)
        self._repeats: Repeats[Tensor] = Repeats(capture)

    def seal(self, start: int, room: Room, version: int) -> None:
        """The page from the anchors' place ``start`` on becomes the room's newest; tensors lie where they lay when the
        version was the same."""
        write_range(self._places, start)
        for layer in self._layers:
            layer.selector.note()
            layer.completion.note()
        packed = self._repeats.run(version, lambda: self._put(room))
        for layer, page in zip(self._layers, packed.split(1), strict=True):
            layer.meter.written += layer.store.append(layer.layer, page)

    def _put(self, room: Room) -> Tensor:
        """The device's part; gives the page of every layer as the store has it, uint8 [layers, rows, slice_bytes]."""
        packed = []
        for layer in self._layers:
            page = layer.anchors.page_at(self._places, room.tokens)
            layer.selector.put(page)
            layer.completion.put(page)
            packed.append(pack_pages(page))
        return torch.cat(packed)
