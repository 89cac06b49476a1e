"""Steps of fixed shapes: what a captured graph can replay, because nothing in them changes from step to step but what
tensors hold.

Everything that is different in every step is the host's and happens between two of them: where the new token goes,
which page seals, how much of the budget there is, what is counted, and upkeep. While pages seal, tensors stay where
they are, up to the room that they have been given; then all of them get a larger one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvoffload.attention.decode import anchor_logits
from kvoffload.attention.layer import Held, LayerCache
from kvoffload.buffers import Room
from kvoffload.selection.topk import list_sizes
from kvoffload.values import Partial, merge

ROOM_TOKENS = 4096
"""Tokens that room is given for at a time."""


def decode_fixed(layer: LayerCache, query: Tensor, keys: Tensor, values: Tensor) -> Partial:
    """The device's part of ``decode`` of one token a row that ``FixedSteps.advance`` has counted: query [rows, R, D],
    keys [rows, 1, D] and values [rows, 1, Dv] to a partial [rows, R]."""
    held = layer.held
    assert held is not None, "between advance and finish"
    layer.anchors.put(keys, values, held.place)
    query = query.float() * layer.geometry.scale
    read = layer.reading.attend(layer, query, anchor_logits(layer, query, held.seen))
    result = merge([read.exact, read.remainder])
    layer.meter.add_mass((read.remainder.lse - result.lse).exp(), 1)
    if layer.upkeep:
        held.query.copy_(query)
    return result


class FixedSteps:
    """The host's part of the steps of all layers of one cache. For each of them: ``advance``, then ``decode_fixed`` on
    every layer, then ``finish``. ``version`` changes when tensors have moved or shapes have changed: what was captured
    before is void then. Everything else may be done to the layers between steps."""

    def __init__(self, layers: Sequence[LayerCache], *, room_tokens: int = ROOM_TOKENS) -> None:
        self._layers = layers
        self._bucket = max(room_tokens // layers[0].geometry.page_size, 1)
        self.version = 0
        self._room = Room(0, layers[0].geometry.page_size, torch.device("cpu"))
        self._parts: list[tuple[Held | None, object, object]] = []
        self._n_tokens = 0

    @staticmethod
    def possible(layers: Sequence[LayerCache]) -> bool:
        """Whether the next step can have fixed shapes. Waits for the device where rows are padded."""
        if not layers or not all(layer.can_hold for layer in layers):
            return False
        first = layers[0]
        alike = all(layer.store is first.store and layer.n_tokens == first.n_tokens for layer in layers)
        return alike and first.anchors.sinks_are_full

    def advance(self) -> bool:
        """Count the new token, seal the page that it pushes out of the window, and tell the device where everything is.
        False, and nothing was done, where there is no memory for fixed shapes."""
        n_pages = self._layers[0].n_pages + (self._layers[0].anchors.n_unsealing == 0)
        if (n_pages > self._room.n_pages or self._is_stale()) and not self._hold(n_pages):
            return False
        for layer in self._layers:
            layer.seal(layer.anchors.advance())
            layer.completion.refresh()
        self._tell(n_pages)
        return True

    def finish(self) -> None:
        """Account for the step; then comes the upkeep that is due."""
        for layer in self._layers:
            assert layer.held is not None, "between advance and finish"
            layer.meter.scored_rows += layer.geometry.rows
            n_lists, length = self._lists(layer)
            layer.fetch.note(layer.geometry.n_sequences * n_lists * length)
            layer.end_steps(layer.held.query, 1)

    def _is_stale(self) -> bool:
        """Whether something else has been done to the layers than steps like these."""
        return self._n_tokens != self._layers[0].n_tokens or any(
            layer.held is not held or layer.selector is not selector or layer.completion is not completion
            for layer, (held, selector, completion) in zip(self._layers, self._parts, strict=True)
        )

    def _hold(self, n_pages: int) -> bool:
        """Give all layers room for ``n_pages`` pages and some more."""
        n_places = -(-(n_pages + 1) // self._bucket) * self._bucket
        if not self._layers[0].store.reserve(n_places):
            return False
        anchors = self._layers[0].anchors
        device = anchors.keys.device
        self._room = Room(n_places, anchors.page_size, device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._seen = torch.zeros_like(anchors.seen(1))
        self._wanted = torch.zeros(len(self._layers), dtype=torch.int64, device=device)
        self._lengths: list[int] = []
        self._n_told = -1
        for layer, wanted in zip(self._layers, self._wanted, strict=True):
            layer.hold(self._held_by(layer, wanted))
        self._parts = [(layer.held, layer.selector, layer.completion) for layer in self._layers]
        self.version += 1
        return True

    def _held_by(self, layer: LayerCache, wanted: Tensor) -> Held:
        """The length of a selection is what the budget buys when the room is full; where that is what it buys now, all
        of it is wanted all the time."""
        shape, n_last = layer.geometry, self._room.n_tokens + layer.anchors.keys.shape[1]
        n_slices = min(layer.budget(n_last), self._room.n_pages * shape.n_kv_heads)
        constant = layer.budget(layer.n_tokens) == n_slices <= layer.n_pages * shape.n_kv_heads
        query = torch.zeros(shape.rows, shape.group_size, shape.key_dim, device=wanted.device)
        return Held(self._room, self._place, self._seen, n_slices, None if constant else wanted, query)

    def _tell(self, n_pages: int) -> None:
        """Bring the device's tensors up to date for the step that comes."""
        anchors, self._n_tokens = self._layers[0].anchors, self._layers[0].n_tokens
        self._place.fill_(anchors.newest_place)
        if n_pages == self._n_told:
            self._seen.index_fill_(2, self._place, True)
        else:
            self._seen.copy_(anchors.seen(1))
            self._room.fill(n_pages)
            self._n_told = n_pages
        lengths = [self._lists(layer)[1] for layer in self._layers]
        if lengths != self._lengths:
            self._wanted.copy_(torch.tensor(lengths))
            self._lengths = lengths

    @staticmethod
    def _lists(layer: LayerCache) -> tuple[int, int]:
        """How many lists a sequence has, and the slices of each that the step may read."""
        return list_sizes(layer.budget(layer.n_tokens), layer.n_pages, layer.geometry.n_kv_heads, layer.pool)
