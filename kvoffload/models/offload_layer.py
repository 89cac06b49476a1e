"""The place of one layer in the cache that a transformers model is given."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from kvoffload.attention.decode import choose_early, decode
from kvoffload.attention.fixed import decode_fixed
from kvoffload.attention.join import join
from kvoffload.attention.layer import LayerCache
from kvoffload.attention.prefill import prepare, refill
from kvoffload.errors import UnsupportedModelError, UsageError
from kvoffload.geometry import Geometry
from kvoffload.models.intake import room_told
from kvoffload.models.tagged import AttendingLayer
from kvoffload.values import Partial, query_rows

if TYPE_CHECKING:
    from kvoffload.models.cache import OffloadCache


class OffloadLayer(AttendingLayer):
    """One layer's place in the cache. Its KV is built at the first attention call, which shows heads, sizes and
    dtype."""

    is_croppable = True

    def __init__(self, cache: "OffloadCache", index: int, place: int) -> None:
        super().__init__()
        self._cache, self._index, self.place = cache, index, place
        self.kv: LayerCache | None = None
        self.n_seen = 0
        self._pending = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.n_seen += key_states.shape[-2]
        self._pending = True
        return self.tag(key_states), value_states

    @room_told()
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None
    ) -> Partial:
        kv, q, k, v = self._rows(query, key, value, scale, softcap)
        return self._attend(kv, q, k, v, mask)

    def is_open(self) -> bool:
        return (self.kv is None or self.kv.n_tokens == 0) and not self._cache.intake.changes_keys

    @room_told()
    def open_with(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> None:
        kv, q, k, v = self._rows(query, key, value, scale, None)
        self._cache.intake.follow(kv, q, k, v)

    def looks_ahead(self, n_tokens: int) -> bool:
        cache = self._cache
        plain = n_tokens == 1 or cache.stepping
        decodes = cache.fixed or (plain and not cache.exact and not cache.rectifies)
        return decodes and cache.config.look_ahead and self.kv is not None and self.kv.can_look_ahead

    def look_ahead(self, guess: Callable[[], Tensor]) -> None:
        assert self.kv is not None, "it looks ahead"
        if not self._cache.fixed:
            self.kv.fix(None)
        query, shape = guess(), self.kv.geometry
        query = query_rows(query.reshape(shape.rows, -1, *query.shape[2:]))
        choose_early(self.kv, query.float() * shape.scale)

    def _rows(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> tuple[LayerCache, Tensor, Tensor, Tensor]:
        """The layer's cache, which is built now if these are its first tokens, with these by row."""
        if not self._pending:
            raise UnsupportedModelError("this model attends twice to one layer's KV, which is not supported")
        self._pending = False
        n_sequences, n_heads = key.shape[:2]
        group = query.shape[1] // n_heads
        q = query.reshape(n_sequences * n_heads, group, *query.shape[2:])
        k, v = key.flatten(0, 1), value.flatten(0, 1)
        if self.kv is None:
            sizes = (n_sequences, n_heads, group, k.shape[-1], v.shape[-1])
            geometry = Geometry(*sizes, self._cache.config.page_size, k.dtype, scale, softcap)
            self.kv = self._cache.build(self._index, self.place, geometry, k, v)
        return self.kv, q, k, v

    def _attend(self, kv: LayerCache, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Partial:
        if self._cache.fixed:
            return _as_heads(kv, decode_fixed(kv, query_rows(q), k, v))
        if self._cache.rectifies:
            return self._cache.intake.rectify(kv, q, k, v)
        one_by_one = q.shape[2] == 1 or self._cache.stepping
        if self._cache.exact or kv.n_tokens == 0 or not one_by_one:
            return self._cache.intake.attend(kv, q, k, v, mask)
        prepare(kv)
        n_new = q.shape[2] - kv.n_revised
        if n_new > kv.run_length(n_new):
            raise UsageError(f"{n_new} tokens in one forward: at most {kv.run_length(n_new)} can be decoded")
        return _as_heads(kv, decode(kv, query_rows(q), k, v))

    def copy_prefill(self, sources: "Sequence[OffloadLayer]") -> None:
        """Take over other layers' tokens as if they had been prefilled here, several as sequences side by side; nothing
        is shared afterwards."""
        theirs = [source.kv for source in sources if source.kv is not None]
        assert len(theirs) == len(sources) > 0, "there is nothing to copy"
        assert self.kv is None, "this layer has tokens already"
        geometry = theirs[0].geometry
        if len(theirs) > 1:
            geometry = replace(geometry, n_sequences=len(theirs))
        self.kv = self._cache.build(self._index, self.place, geometry, *theirs[0].anchors.buffers)
        if len(theirs) > 1:
            join(self.kv, theirs)
        else:
            refill(self.kv, theirs[0])
        self.n_seen = self.kv.n_tokens

    def get_seq_length(self) -> int:
        return self.n_seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens (transformers passes their number, negative or not); sealed ones cannot go."""
        n_tokens = abs(tokens_to_remove)
        if self.kv is not None:
            try:
                self.kv.anchors.crop(n_tokens)
            except ValueError as error:
                raise UsageError(str(error)) from error
        self.n_seen -= n_tokens

    def reset(self) -> NoReturn:
        raise UsageError("an offloaded cache cannot be reset: open a new one")

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        raise UsageError("num_beams > 1 is not supported: sealed pages are never copied or reordered")

    batch_repeat_interleave = batch_select_indices = reorder_cache


def _as_heads(kv: LayerCache, step: Partial) -> Partial:
    """A partial in query rows as [rows, R, Q, ...]."""
    return Partial(*(t.unflatten(0, (kv.geometry.rows, -1)).transpose(1, 2) for t in (step.output, step.lse)))
