"""Steps of fixed shapes: what a captured graph can replay, because nothing in them changes from step to step but what
tensors hold.

Everything that is different in every step is the host's and happens between two of them: where the new token goes,
which page seals, how much of the budget there is, what is counted, and upkeep. While pages seal, tensors stay where
they are, up to the room that they have been given; then all of them get a larger one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from kvoffload_kernels.dispatch import begin_step, finish_step
from torch import Tensor

from kvoffload.attention.layer import Fixed, LayerCache
from kvoffload.attention.sealing import Sealing
from kvoffload.buffers import Room
from kvoffload.repeats import Capture
from kvoffload.selection.topk import list_sizes
from kvoffload.values import Partial

ROOM_TOKENS = 4096
"""Tokens that room is given for at a time."""


def decode_fixed(layer: LayerCache, query: Tensor, keys: Tensor, values: Tensor) -> Partial:
    """The device's part of ``decode`` of one token a row that ``FixedSteps.advance`` has counted: query [rows, R, D],
    keys [rows, 1, D] and values [rows, 1, Dv] to a partial [rows, R], its output in
    the query's dtype."""
    fixed = layer.fixed
    assert fixed is not None, "between advance and finish"
    layer.take_early()
    shape, place = layer.geometry, (layer.anchors.buffers, fixed.place)
    attended = begin_step(
        query, keys, values, *place, fixed.query, seen=fixed.seen[:, 0], scale=shape.scale, softcap=shape.softcap
    )
    anchors = Partial(*attended)
    pages, rest = layer.reading.attend_fixed(layer, fixed.query, anchors)
    masses, guess = layer.meter.masses_like(anchors.lse), None if rest is None else rest.both()
    return Partial(*finish_step(anchors.both(), pages.both(), guess, masses, query.dtype))


class Lists(NamedTuple):
    """The lists of a layer's selection: how many there are, and how many slices are in each."""

    n_lists: int
    length: int

    @property
    def n_slices(self) -> int:
        return self.n_lists * self.length


class FixedSteps:
    """The host's part of the steps of all layers of one cache. For each of them: ``advance``, then ``decode_fixed`` on
    every layer, then ``finish``. ``version`` changes when tensors have moved or shapes have changed: what was captured
    before is void then. Everything else may be done to the layers between steps. With ``capture`` sealing is
    replayed."""

    def __init__(
        self, layers: Sequence[LayerCache], *, room_tokens: int = ROOM_TOKENS, capture: Capture | None = None
    ) -> None:
        self._layers, self._capture = layers, capture
        self._sealing: Sealing | None = None
        self._bucket = max(room_tokens // layers[0].geometry.page_size, 1)
        self.version = 0
        self._room = Room(0, layers[0].geometry.page_size, torch.device("cpu"))
        self._parts: list[tuple[Fixed | None, object, object]] = []  # of each layer, when its steps were fixed
        self._lists: list[Lists] = []  # of each layer in the step that comes or was last
        self._longest: list[Lists] = []
        self._n_tokens = 0

    @staticmethod
    def possible(layers: Sequence[LayerCache]) -> bool:
        """Whether the next step can have fixed shapes. Waits for the device where rows are padded."""
        if not layers or not all(layer.can_fix for layer in layers):
            return False
        first = layers[0]
        alike = all(layer.store is first.store and layer.n_tokens == first.n_tokens for layer in layers)
        return alike and first.anchors.sinks_are_full

    def advance(self) -> bool:
        """Count the new token, seal the page that it pushes out of the window, and tell the device where everything is.
        False, and nothing was done, where steps cannot have fixed shapes."""
        n_pages = self._layers[0].n_pages + (self._layers[0].anchors.n_unsealing == 0)
        self._lists = [_lists(layer, layer.budget(layer.n_tokens + 1), n_pages) for layer in self._layers]
        if (n_pages > self._room.n_pages or self._is_stale()) and not self._fix(n_pages):
            return False
        starts = [layer.anchors.count() for layer in self._layers]
        self._tell(n_pages)
        if starts[0] is not None:
            assert self._sealing is not None, "steps are fixed"
            self._sealing.seal(starts[0])
        for layer in self._layers:
            layer.completion.refresh()
        return True

    def finish(self) -> None:
        """Account for the step; then comes the upkeep that is due."""
        for layer, lists in zip(self._layers, self._lists, strict=True):
            assert layer.fixed is not None, "between advance and finish"
            layer.meter.scored_rows += layer.geometry.rows * layer.n_scorings
            layer.fetch.note(lists.n_slices)
            layer.end_steps(layer.fixed.query, 1)

    def _is_stale(self) -> bool:
        """Whether something else has been done to the layers than steps like these, or the budget buys other selections
        than theirs."""
        return self._n_tokens != self._layers[0].n_tokens or any(
            part != (layer.fixed, layer.selector, layer.completion) or not self._buys(layer, lists, longest)
            for layer, part, lists, longest in zip(self._layers, self._parts, self._lists, self._longest, strict=True)
        )

    @staticmethod
    def _buys(layer: LayerCache, lists: Lists, longest: Lists) -> bool:
        """Whether the layer's steps can read these lists: all of a selection, or the first of each where it can say
        how many."""
        counted = layer.fixed is not None and layer.fixed.n_wanted is not None
        return lists.length <= longest.length if counted else lists == longest

    def _fix(self, n_pages: int) -> bool:
        """Give all layers room for ``n_pages`` pages and some more."""
        n_places = self._reserved(n_pages) if self.possible(self._layers) else 0
        if n_places <= n_pages:  # also where there are no pages yet
            return False
        anchors = self._layers[0].anchors
        device = anchors.keys.device
        self._room = Room(n_places, anchors.page_size, device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        self._seen = torch.zeros_like(anchors.seen(1))
        self._seen_before = torch.zeros_like(self._seen)
        self._wanted = torch.zeros(len(self._layers), dtype=torch.int64, device=device)
        self._told: tuple[int, list[int]] = (-1, [])
        self._longest = [self._when_full(layer, now) for layer, now in zip(self._layers, self._lists, strict=True)]
        for i, (layer, now, longest) in enumerate(zip(self._layers, self._lists, self._longest, strict=True)):
            shape = layer.geometry
            query = torch.zeros(shape.rows, shape.group_size, shape.key_dim, device=device)
            wanted = None if now == longest else self._wanted[i]
            n_slices = longest.n_slices // shape.n_sequences
            layer.fix(Fixed(self._room, self._place, self._seen, self._seen_before, n_slices, wanted, query))
        self._sealing = Sealing(self._layers, self._room, self._capture)
        self._parts = [(layer.fixed, layer.selector, layer.completion) for layer in self._layers]
        self.version += 1
        return True

    def _reserved(self, n_pages: int) -> int:
        """Places for pages whose memory stays where it is: a bucket more at most, or what the store has anyway."""
        n_places, store = -(-(n_pages + 1) // self._bucket) * self._bucket, self._layers[0].store
        mapped = [memory for layer in self._layers if (memory := store.mapped(layer.layer)) is not None]
        if not mapped:  # the host brings slices from where they are
            return n_places
        n_now = min(len(memory) for memory in mapped)
        if n_now > n_pages:
            return min(n_places, n_now)
        return n_places if store.reserve(n_places) else 0

    def _when_full(self, layer: LayerCache, now: Lists) -> Lists:
        """What the budget buys when the room is full, but no more than the page cache has places for as long as it has
        enough. Where that is what it buys now, all of a selection is wanted in every step."""
        n_last, places = self._room.n_tokens + layer.anchors.keys.shape[1], layer.fetch.slots.places
        longest = _lists(layer, layer.budget(n_last), self._room.n_pages)
        if places is None or not now.n_slices <= places < longest.n_slices:
            return longest
        return _lists(layer, places // layer.geometry.n_sequences, self._room.n_pages)

    def _tell(self, n_pages: int) -> None:
        """Bring the device's tensors up to date for the step that comes."""
        anchors, self._n_tokens = self._layers[0].anchors, self._layers[0].n_tokens
        n_told, lengths = self._told
        self._place.fill_(anchors.newest_place)
        if n_pages != n_told:
            self._seen.copy_(anchors.seen(1)).index_fill_(2, self._place, False)
            self._room.fill(n_pages)
        self._seen_before.copy_(self._seen)
        self._seen.index_fill_(2, self._place, True)
        self._told = (n_pages, [lists.length for lists in self._lists])
        if self._told[1] != lengths:
            self._wanted.copy_(torch.tensor(self._told[1]))


def _lists(layer: LayerCache, n_slices: int, n_pages: int) -> Lists:
    """The lists that a budget of so many slices a sequence gives."""
    shape = layer.geometry
    n_lists, length = list_sizes(n_slices, n_pages, shape.n_kv_heads, layer.pool)
    return Lists(shape.n_sequences * n_lists, length)
