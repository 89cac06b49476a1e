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
the slices that a row has seen are held on the device, so that its remainder can be estimated for their union.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from kvoffload_kernels.dispatch import attend_slices
from pydantic import Field
from torch import Tensor

from kvoffload.attention.layer import LayerCache
from kvoffload.attention.reading import Read, Reading, WrapperReading
from kvoffload.buffers import page_mask, tensor_bytes
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
            layer.reading = RetroReading(layer.reading, self.n_revised)


@dataclass(frozen=True)
class Row:
    """What is kept of one revisable token in one layer: the partial [rows, R] over the pages it has seen, which ones
    they are (bool [rows, P]), and the slices themselves where a completion needs them."""

    pages: Partial
    seen: Tensor
    held: Fetched | None

    @staticmethod
    def blank(query: Tensor, value_dim: int) -> "Row":
        """Of a token that was decoded before there were pages."""
        return Row(Partial.empty(query, value_dim), query.new_zeros(query.shape[0], 0, dtype=torch.bool), None)

    @property
    def resident_bytes(self) -> int:
        held = 0 if self.held is None else tensor_bytes(self.held.keys, self.held.values)
        return held + tensor_bytes(self.pages.output, self.pages.lse, self.seen)


class RetroReading(WrapperReading):
    """The wrapped reading for the newest query of each row; cached partials and supplements for the others."""

    single_steps = True

    def __init__(self, inner: Reading, n_kept: int) -> None:
        super().__init__(inner)
        self._n_kept = n_kept
        self._rows: list[Row] = []  # oldest first
        self._sealed: Pages | None = None

    @property
    def resident_bytes(self) -> int:  # type: ignore[override]
        return self.inner.resident_bytes + sum(row.resident_bytes for row in self._rows)

    def restart(self) -> None:
        super().restart()
        self._rows, self._sealed = [], None

    def sealed(self, pages: Pages) -> None:
        super().sealed(pages)
        self._sealed = pages

    def attend(self, layer: LayerCache, query: Tensor, anchors: Partial) -> Read:
        rows = layer.geometry.rows
        queries, outputs, lses = (t.unflatten(0, (rows, -1)).unbind(1) for t in (query, anchors.output, anchors.lse))
        by_query = [Partial(*part) for part in zip(outputs, lses, strict=True)]
        newest = self.inner.attend(layer, queries[-1], by_query[-1])
        n_older = len(queries) - 1
        while len(self._rows) < n_older:
            self._rows.insert(0, Row.blank(queries[0], layer.geometry.value_dim))
        older = self._rows[len(self._rows) - n_older :]
        loaded = self._loaded(layer, newest.fetched)
        self._rows = [self._supplement(layer, *pair, loaded) for pair in zip(older, queries[:-1], strict=True)]
        parts = [self._parts(layer, *row) for row in zip(self._rows, queries[:-1], by_query[:-1], strict=True)]
        parts.append((newest.exact, newest.remainder))
        blank = Row.blank(queries[-1], layer.geometry.value_dim)
        self._rows.append(self._supplement(layer, blank, queries[-1], [newest.fetched]))
        self._rows, self._sealed = self._rows[-self._n_kept :], None
        exact, remainder = (_side_by_side(part) for part in zip(*parts, strict=True))
        return Read(exact, remainder, newest.fetched, newest.scores)

    def _loaded(self, layer: LayerCache, fetched: Fetched) -> list[Fetched]:
        """What came to the device in this step: the pages that sealed, and those of the selection that did not."""
        if self._sealed is None:
            return [fetched]
        first = layer.n_pages - self._sealed.n_pages
        left = fetched.page_ids < first
        return [_slices(self._sealed, first), _pick(fetched, left)]

    def _supplement(self, layer: LayerCache, row: Row, query: Tensor, loaded: list[Fetched]) -> Row:
        """The row with what it has not seen of the loaded slices."""
        seen = F.pad(row.seen, (0, layer.n_pages - row.seen.shape[1]))
        new = [_pick(part, ~seen[part.row_ids, part.page_ids]) for part in loaded]
        partials = [row.pages]
        for part in new:
            attended = attend_slices(query, part.keys, part.values, part.row_ids, part.valid, layer.geometry.softcap)
            partials.append(Partial(*attended))
            seen = seen | page_mask(part.page_ids, part.row_ids, *seen.shape)
        held = None
        if layer.completion.state_bytes:
            held = Fetched.join([*(() if row.held is None else (row.held,)), *new])
        return Row(merge(partials), seen, held)

    def _parts(self, layer: LayerCache, row: Row, query: Tensor, anchors: Partial) -> tuple[Partial, Partial]:
        """Of a revised row: anchors as they are now with the pages it has seen, and the remainder behind those."""
        exact = merge([anchors, row.pages])
        if row.held is None:
            return exact, Partial.empty(query, layer.geometry.value_dim)
        scores = query.new_zeros(1).expand(*query.shape[:2], layer.n_pages)
        if layer.completion.uses_scores:
            scores = layer.score(query).to(query.device)
        return exact, layer.completion.estimate(query, row.held, scores)


def _side_by_side(parts: Sequence[Partial]) -> Partial:
    """Partials [rows, R] of a row's queries in order as query rows."""
    output, lse = (torch.stack([getattr(p, name) for p in parts], 1).flatten(0, 1) for name in ("output", "lse"))
    return Partial(output, lse)


def _pick(fetched: Fetched, keep: Tensor) -> Fetched:
    """Copies of some of the slices, with their row ids; waits for the device."""
    valid = None if fetched.valid is None else fetched.valid[keep]
    return Fetched(fetched.keys[keep], fetched.values[keep], valid, fetched.row_ids[keep], fetched.page_ids[keep])


def _slices(pages: Pages, first: int) -> Fetched:
    """Pages ``first`` and on of all rows as slices."""
    rows, n_pages = pages.keys.shape[:2]
    row_ids = torch.arange(rows, device=pages.keys.device).repeat_interleave(n_pages)
    page_ids = torch.arange(first, first + n_pages, device=pages.keys.device).repeat(rows)
    valid = None if pages.valid is None else pages.valid.flatten(0, 1)
    return Fetched(pages.keys.flatten(0, 1), pages.values.flatten(0, 1), valid, row_ids, page_ids)
