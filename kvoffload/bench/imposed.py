"""Selections with a given share of hits. Random weights have no topics: what a step selects says little about the next
one. So a benchmark of a page cache takes that share from a model that has, and imposes it."""

import torch
from torch import Tensor

from kvoffload.attention.choosing import Chooser
from kvoffload.attention.layer import LayerCache
from kvoffload.values import Selection

_N_STEPS = 256  # then the trace begins anew


class ImposedHits(Chooser):
    """Does all that another chooser does, then reads other pages: as many, the same number for every row, of which
    ``share`` were read in the step before and the others not for a long time."""

    can_hold = True

    def __init__(self, inner: Chooser, share: float) -> None:
        self._inner, self._share = inner, share
        self._trace: Tensor | None = None  # int64 [steps, 2, F], rows and pages
        self._step: Tensor | None = None

    def choose(self, layer: LayerCache, query: Tensor, anchor_lse: Tensor) -> tuple[Selection, Tensor]:
        selection, scores = self._inner.choose(layer, query, anchor_lse)
        if self._trace is None or self._step is None or self._trace.shape[2] != len(selection):
            drawn = draw_trace(len(selection), layer.geometry.rows, layer.n_pages, self._share, seed=layer.layer)
            self._trace = drawn.to(scores.device)
            self._step = torch.zeros(1, dtype=torch.int64, device=scores.device)
        self._step.add_(1).remainder_(_N_STEPS)
        row_ids, page_ids = self._trace.index_select(0, self._step)[0]
        return Selection(row_ids, page_ids, selection.n_queries, selection.wanted), scores

    def rank(self, layer: LayerCache, scores: Tensor, anchor_lse: Tensor) -> Tensor:
        return self._inner.rank(layer, scores, anchor_lse)


def draw_trace(n_slices: int, n_rows: int, n_pages: int, share: float, *, seed: int) -> Tensor:
    """Rows and pages of ``n_slices`` distinct slices for each step, int64 [steps, 2, n_slices]: new ones come from a
    shuffled list of each row's pages, taken in turn."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.stack([torch.randperm(n_pages, generator=generator) for _ in range(n_rows)])
    places, rows = torch.arange(n_slices), torch.arange(n_slices) % n_rows
    n_changed = torch.arange(_N_STEPS)[:, None] * (n_slices - round(share * n_slices))  # so far; the oldest go
    n_times = (n_changed - places + n_slices - 1) // n_slices  # that each place was among them
    turns = places // n_rows + n_times * -(-n_slices // n_rows)
    return torch.stack([rows.expand_as(turns), pages[rows, turns % n_pages]], 1)
