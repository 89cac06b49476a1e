"""``retro``: RetroAttention (arXiv:2508.09001, ICLR'26): the newest tokens are computed again with every new one, and
their attention is supplemented with the pages that the new token loads.

A forward has ``window`` query rows. Only the newest selects and loads pages; an older row attends to those of them that
it has not seen yet, and the supplement is merged into its cached output by log-sum-exp. All rows go on through the
layer's other parts, so the keys and values of the older tokens are written anew in every deeper layer.

Built from notes and reviews; the official repository holds no code. Filled in: the log-sum-exp beside each output, and
a mask of pages a row has seen instead of the table of last loads. Deviations: the anchors' part of an older row is
not cached but computed anew from its new query and the window as it is now, since it costs no reads; a page that seals
while a row is revisable is supplemented to it from the window, because the row had seen its tokens there. The cached
part belongs to the row's older query, as in the paper, so it is exact in the first layer only. Beside a completion
the slices that a row has seen are held on the device, so that its remainder can be estimated for their union. With
``fetch = deadline`` a page that is late is in the remainder of every row, and supplements the older ones when a later
step selects it again and it comes in time.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from kvoffload_kernels.dispatch import attend_slices
from pydantic import Field
from torch import Tensor

from kvoffload.attention.layer import LayerCache
from kvoffload.attention.reading import Read, Reading, WrapperReading, estimate_again
from kvoffload.buffers import tensor_bytes
from kvoffload.policies.base import Depth, Policy, PolicyConfigBase
from kvoffload.values import Fetched, Pages, Partial, merge


class RetroPolicyConfig(PolicyConfigBase):
    """``window`` tokens a forward, the new one included; 1 is off."""

    kind: Literal["retro"] = "retro"
    window: int = Field(2, ge=1, le=64)

    def build(self) -> Policy:
        return Retro(self.window)

    def check(self, *, recent: int, kinds: tuple[str, ...]) -> None:
        if self.window > recent:
            raise ValueError(
                f"policy retro: window={self.window} must not exceed recent={recent}: sealed pages never change"
            )
        if "refresh" in kinds:
            raise ValueError("policy retro: refresh has full passes, which load no pages: give one of the two")


class Retro(Policy):
    def __init__(self, window: int) -> None:
        self.n_revised = window - 1

    def attach(self, layer: LayerCache, depth: Depth) -> None:
        if self.n_revised:
            layer.reading = RetroReading(layer.reading)


@dataclass(frozen=True)
class Kept:
    """What is kept of the n tokens of a forward in one layer, oldest first, in query rows: the partials [rows * n, R]
    over the pages they have seen, which ones those are (bool [rows, n, P]), and the slices themselves where a
    completion needs them."""

    pages: Partial
    seen: Tensor
    held: Fetched | None

    @property
    def n_tokens(self) -> int:
        return self.seen.shape[1]

    def followed(self, n: int, n_pages: int) -> "Kept":
        """The newest n - 1 and behind them a new one that has seen nothing yet, of so many pages. Those that were
        decoded before there were pages have seen nothing either."""
        rows, n_before, n_known = self.seen.shape
        missing = max(n - 1 - n_before, 0)
        gone = n_before + missing + 1 - n
        output, lse = (t.unflatten(0, (rows, n_before))[:, gone:] for t in self.pages.both())
        output = F.pad(output, (0, 0, 0, 0, missing, 1)).flatten(0, 1)
        lse = F.pad(lse, (0, 0, missing, 1), value=-torch.inf).flatten(0, 1)
        seen = F.pad(self.seen[:, gone:], (0, n_pages - n_known, missing, 1))
        held = self.held
        if held is not None:
            number = held.row_ids % n_before - gone
            kept = (number >= 0).nonzero()[:, 0]
            row_ids = held.row_ids // n_before * n + number + missing
            held = replace(_pick(held, kept), row_ids=row_ids[kept])
        return Kept(Partial(output, lse), seen, held)

    @property
    def resident_bytes(self) -> int:
        held = 0 if self.held is None else tensor_bytes(self.held.keys, self.held.values)
        return held + tensor_bytes(self.pages.output, self.pages.lse, self.seen)


class RetroReading(WrapperReading):
    """The wrapped reading for the newest query of each row; cached partials and supplements for the others. What is new
    to any token of a row is attended to in one call, whatever the window; to learn how much that is waits for the
    device."""

    single_steps = True

    def __init__(self, inner: Reading) -> None:
        super().__init__(inner)
        self._kept: Kept | None = None
        self._sealed: Pages | None = None

    @property
    def resident_bytes(self) -> int:  # type: ignore[override]
        return self.inner.resident_bytes + (0 if self._kept is None else self._kept.resident_bytes)

    def restart(self) -> None:
        super().restart()
        self._kept, self._sealed = None, None

    def sealed(self, pages: Pages) -> None:
        super().sealed(pages)
        self._sealed = pages

    def attend(self, layer: LayerCache, query: Tensor, anchors: Partial) -> Read:
        n = query.shape[0] // layer.geometry.rows
        newest = self.inner.attend(layer, query[n - 1 :: n], Partial(*(t[n - 1 :: n] for t in anchors.both())))
        kept = self._kept = self._supplement(layer, query, newest.fetched)
        if n == 1:
            return newest
        remainder = self._remainder(layer, query, kept.held)
        return Read(merge([anchors, kept.pages]), remainder, newest.fetched, newest.scores)

    def _supplement(self, layer: LayerCache, query: Tensor, fetched: Fetched) -> Kept:
        """All tokens of a forward with what they had not seen of what came to the device in this step: the pages that
        sealed, and the selection, which is all that the newest one sees."""
        rows, n_pages, n = layer.geometry.rows, layer.n_pages, query.shape[0] // layer.geometry.rows
        if self._kept is None:
            none = query.new_zeros(rows, 0, n_pages, dtype=torch.bool)
            self._kept = Kept(Partial.empty(query[:0], layer.geometry.value_dim), none, None)
        before, chosen = self._kept.followed(n, n_pages), fetched.mask(rows, n_pages)
        loaded = self._loaded(layer, fetched)
        lacking = ~before.seen
        lacking[:, -1] = chosen
        slices, number = lacking[loaded.row_ids, :, loaded.page_ids].nonzero().unbind(1)
        new = replace(_pick(loaded, slices), row_ids=loaded.row_ids[slices] * n + number)
        attended = attend_slices(query, new.keys, new.values, new.row_ids, new.valid, layer.geometry.softcap)
        seen = before.seen | loaded.mask(rows, n_pages)[:, None]
        seen[:, -1] = chosen
        held = None
        if layer.completion.state_bytes:
            held = new if before.held is None else Fetched.join([before.held, new])
        return Kept(merge([before.pages, Partial(*attended)]), seen, held)

    def _loaded(self, layer: LayerCache, fetched: Fetched) -> Fetched:
        """What came to the device in this step: the pages that sealed, and those of the selection that did not."""
        if self._sealed is None:
            return fetched
        first = layer.n_pages - self._sealed.n_pages
        sealed, self._sealed = _slices(self._sealed, first), None
        return Fetched.join([sealed, _pick(fetched, (fetched.page_ids < first).nonzero()[:, 0])])

    def _remainder(self, layer: LayerCache, query: Tensor, held: Fetched | None) -> Partial:
        """Behind the pages that each token has seen; the newest one's scores were counted already."""
        if held is None:
            return Partial.empty(query, layer.geometry.value_dim)
        scores = query.new_zeros(1).expand(*query.shape[:2], layer.n_pages)
        if layer.completion.uses_scores:
            scores = layer.score(query, query.shape[0] - layer.geometry.rows).to(query.device)
        return estimate_again(layer, query, held, scores)


def _pick(fetched: Fetched, which: Tensor) -> Fetched:
    """Copies of the slices ``which`` (int64), with their row ids."""
    valid = None if fetched.valid is None else fetched.valid[which]
    return Fetched(fetched.keys[which], fetched.values[which], valid, fetched.row_ids[which], fetched.page_ids[which])


def _slices(pages: Pages, first: int) -> Fetched:
    """Pages ``first`` and on of all rows as slices."""
    rows, n_pages = pages.keys.shape[:2]
    row_ids = torch.arange(rows, device=pages.keys.device).repeat_interleave(n_pages)
    page_ids = torch.arange(first, first + n_pages, device=pages.keys.device).repeat(rows)
    valid = None if pages.valid is None else pages.valid.flatten(0, 1)
    return Fetched(pages.keys.flatten(0, 1), pages.values.flatten(0, 1), valid, row_ids, page_ids)
