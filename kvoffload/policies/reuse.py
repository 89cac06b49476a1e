"""Choosing once and reusing the choice: what PrHS' index sharing, TokenSelect's selection cache and HShare's sharing
over steps have in common."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvoffload.attention.choosing import Chooser
from kvoffload.attention.layer import LayerCache
from kvoffload.buffers import page_mask, tensor_bytes
from kvoffload.selection.topk import take_best
from kvoffload.values import Selection


@dataclass(frozen=True)
class QueryGate:
    """Whether a query is near enough to an earlier one: the mean over ``shared_rows`` rows in a row and their heads of
    the cosine is above ``tau``, and no norm has changed by more than the factor ``norm_ratio`` where that is given.

    The cosine is taken of rotated queries, which is what the attention sees: two equal tokens at different places
    differ by their rotation.
    """

    tau: float
    norm_ratio: float | None = None

    def passes(self, query: Tensor, anchor: Tensor, *, shared_rows: int = 1) -> Tensor:
        """Queries [rows, R, D] against earlier ones, bool [rows]."""
        cosine = torch.cosine_similarity(query, anchor, dim=-1)
        near = cosine.view(-1, shared_rows * query.shape[1]).mean(1) > self.tau
        if self.norm_ratio is not None:
            change = (query.norm(dim=-1) / anchor.norm(dim=-1)).log().abs().view(len(near), -1).amax(1)
            near &= change <= torch.tensor(self.norm_ratio).log()
        return near.repeat_interleave(shared_rows)


@dataclass(frozen=True)
class Dilation:
    """The best ``hits`` (a share) of a row's pages bring their neighbours up to ``reach`` pages away."""

    hits: float
    reach: int

    def dilate(self, ranking: Tensor, row_ids: Tensor, page_ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """As many slices of each row as it has: the best hits, then neighbours, nearest first, then the other hits.
        ranking fp32 [rows, P]; counts int64 [rows]."""
        rows, n_pages = ranking.shape
        chosen = page_mask(page_ids, row_ids, rows, n_pages)
        order = ranking.masked_fill(~chosen, -torch.inf).argsort(dim=1, descending=True)
        place = torch.arange(n_pages, device=ranking.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, place)
        best = chosen & (rank < (counts * self.hits).long()[:, None])
        priority = torch.where(chosen, -rank.float() - 1, -torch.inf)  # below every neighbour
        for distance in range(self.reach, 0, -1):
            beside = torch.zeros_like(best)
            beside[:, distance:] |= best[:, :-distance]
            beside[:, :-distance] |= best[:, distance:]
            priority = priority.masked_fill(beside, 1 / (1 + distance))
        return take_best(priority.masked_fill(best, 1.0), counts)


class Reusing(Chooser):
    """The selection of a block's first step, the anchor, serves its other steps.

    A row whose query fails the gate is scored anew, for as many slices as it had, and its new query and selection
    stand for it from then on; where no row passes, the block begins anew. With ``dilation`` the steps behind the anchor
    read neighbours of its best pages instead of its worst pages: a step never reads more than its anchor. Rows that
    must agree (``shared_rows`` in a row) pass or fail together. A budget for everything is the wrapped chooser's.

    The gate needs an answer on the host, once a layer and step. The reference scores all rows where one fails and
    counts the failing ones, since a scorer by row would stop there.
    """

    single_steps = True

    def __init__(
        self,
        inner: Chooser,
        *,
        block: int | None,
        gate: QueryGate | None,
        dilation: Dilation | None = None,
        shared_rows: int = 1,
    ) -> None:
        self._inner, self._block, self._gate, self._dilation = inner, block, gate, dilation
        self._shared_rows = shared_rows
        self.restart()

    def restart(self) -> None:
        self._inner.restart()
        self._age = 0
        self._queries: Tensor | None = None  # of each row's last scoring, [rows, R, D]
        self._kept: tuple[Tensor, Tensor] | None = None  # row and page ids for the steps that follow
        self._stale: Tensor | None = None

    @property
    def resident_bytes(self) -> int:  # type: ignore[override]
        kept = self._kept or ()
        return tensor_bytes(*kept, *(() if self._queries is None else (self._queries,)))

    def forget(self, rows: Tensor) -> None:
        self._stale = rows if self._stale is None else self._stale | rows

    def rank(self, layer: LayerCache, scores: Tensor, anchor_lse: Tensor) -> Tensor:
        return self._inner.rank(layer, scores, anchor_lse)

    def choose(self, layer: LayerCache, query: Tensor, anchor_lse: Tensor) -> tuple[Selection, Tensor]:
        rows = layer.geometry.rows
        if query.shape[0] > rows or layer.reads_everything:
            return self._inner.choose(layer, query, anchor_lse)
        failed = self._failed(query)
        n_failed = rows if failed is None else int(failed.sum())
        if failed is None or n_failed == rows:
            return self._begin(layer, query, anchor_lse)
        self._age += 1
        if n_failed == 0:
            return Selection(*self._of_block()), self._scores(layer, query)
        return self._begin_rows(layer, query, anchor_lse, failed, n_failed)

    def _failed(self, query: Tensor) -> Tensor | None:
        """Which rows must be scored anew, bool [rows]; None where a block begins."""
        if self._queries is None or self._age == self._block:
            return None
        failed = torch.zeros(query.shape[0], dtype=torch.bool, device=query.device)
        if self._gate is not None:
            failed = ~self._gate.passes(query, self._queries, shared_rows=self._shared_rows)
        if self._stale is not None:
            together = self._stale.view(-1, self._shared_rows).any(1)
            failed |= together.repeat_interleave(self._shared_rows)
        self._stale = None
        return failed

    def _begin(self, layer: LayerCache, query: Tensor, anchor_lse: Tensor) -> tuple[Selection, Tensor]:
        selection, scores = self._inner.choose(layer, query, anchor_lse)
        self._age, self._queries, self._stale = 1, query, None
        ids, ranking = (selection.row_ids, selection.page_ids), self.rank(layer, scores, anchor_lse)
        self._kept = self._dilated(ranking, *ids)
        return selection, scores

    def _begin_rows(
        self, layer: LayerCache, query: Tensor, anchor_lse: Tensor, failed: Tensor, n_failed: int
    ) -> tuple[Selection, Tensor]:
        scores = layer.score(query, n_failed)
        ranking, failed_there = self.rank(layer, scores, anchor_lse), failed.to(scores.device)
        row_ids, page_ids = self._of_block()
        counts = row_ids.bincount(minlength=len(failed)) * failed_there
        new = take_best(ranking, counts)
        old = ~failed_there[row_ids]
        read = Selection(torch.cat([row_ids[old], new[0]]), torch.cat([page_ids[old], new[1]]))
        later = self._dilated(ranking, *new)
        self._kept = torch.cat([row_ids[old], later[0]]), torch.cat([page_ids[old], later[1]])
        assert self._queries is not None
        self._queries = torch.where(failed[:, None, None], query, self._queries)
        return read, scores

    def _of_block(self) -> tuple[Tensor, Tensor]:
        assert self._kept is not None, "a block begins with a choice"
        return self._kept

    def _dilated(self, ranking: Tensor, row_ids: Tensor, page_ids: Tensor) -> tuple[Tensor, Tensor]:
        if self._dilation is None:
            return row_ids, page_ids
        counts = row_ids.bincount(minlength=ranking.shape[0])
        return self._dilation.dilate(ranking, row_ids, page_ids, counts)

    def _scores(self, layer: LayerCache, query: Tensor) -> Tensor:
        """Nobody looks at them unless the completion does."""
        if layer.completion.uses_scores:
            return layer.score(query)
        return query.new_zeros(1).expand(*query.shape[:2], layer.n_pages)
