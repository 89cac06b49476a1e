"""How the tokens of exact forwards enter the layers of a cache."""

from collections.abc import Iterator
from contextlib import contextmanager

from kvoffload_storage.errors import CapacityError
from torch import Tensor

from kvoffload.attention.behind import Behind
from kvoffload.attention.layer import TAIL_QUERIES, LayerCache
from kvoffload.attention.prefill import attend_chunk, take_in
from kvoffload.errors import OutOfRoomError
from kvoffload.models.freeze import SharedKv
from kvoffload.models.padding import note_padding
from kvoffload.policies.base import Depth, Freezing
from kvoffload.values import Partial


@contextmanager
def room_told() -> Iterator[None]:
    """A tier that is full is the user's to solve."""
    try:
        yield
    except CapacityError as error:
        raise OutOfRoomError(str(error)) from error


class Intake:
    """Of a cache with ``n_layers`` offloaded layers, which a forward visits in order. A layer's tokens go in beside the
    next layer's computation, the last one's at once, so between two forwards everything is in its place.

    ``whole`` says that a forward takes in a prompt at once: a layer that was empty is summarised from the keys that are
    on the device still, and ``prepare`` has nothing left to do.
    """

    def __init__(self, n_layers: int, freezing: Freezing | None) -> None:
        self._n_layers, self._behind, self.whole = n_layers, Behind(), False
        self._shared_kv = SharedKv(freezing) if freezing is not None and freezing.what == "kv" else None

    def attend(self, kv: LayerCache, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Partial:
        """Dense causal attention of a chunk, whose tokens go in: query [rows, R, Q, D], keys [rows, Q, D] and values
        [rows, Q, Dv]."""
        if self._shared_kv is not None:
            keys, values = self._shared_kv.share(Depth(kv.layer, self._n_layers), kv.n_tokens, keys, values)
        note_padding(kv, mask)
        partial = attend_chunk(kv, query, keys, values)
        self.follow(kv, query, keys, values)
        return partial

    def follow(self, kv: LayerCache, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """The tokens of a chunk go in whose attention was asked for already."""
        newest = query[:, :, -TAIL_QUERIES:].clone()
        whole = self.whole and kv.n_tokens == 0
        self._behind.follow(lambda: take_in(kv, newest, keys, values, whole=whole), (newest, keys, values))
        self._finish_after(kv)

    def rectify(self, kv: LayerCache, query: Tensor, keys: Tensor, values: Tensor) -> Partial:
        """As ``attend`` for tokens that are computed anew: reads count as decode reads, summaries stay as they are."""
        partial = attend_chunk(kv, query, keys, values, kv.fetch.decode)
        self._behind.follow(lambda: kv.append(keys, values), (keys, values))
        self._finish_after(kv)
        return partial

    def finish(self) -> None:
        """Everything that a forward brought is in its place, also when it was broken off."""
        self._behind.finish()

    @property
    def changes_keys(self) -> bool:
        """Whether a layer attends to other keys than those it is given."""
        return self._shared_kv is not None

    def _finish_after(self, kv: LayerCache) -> None:
        if kv.layer == self._n_layers - 1:
            self._behind.finish()
