"""Choosing once and reusing the choice: what PrHS' index sharing, TokenSelect's selection cache and HShare's sharing
over steps have in common."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from torch import Tensor

from kvoffload.attention.choosing import Chooser
from kvoffload.attention.layer import LayerCache
from kvoffload.buffers import tensor_bytes
from kvoffload.selection.topk import take_best
from kvoffload.values import Selection


@dataclass(frozen=True)
class QueryGate:
    """Whether a query is near enough to an earlier one: the mean over ``shared_rows`` rows in a row and their heads of
    the cosine is above ``tau``, and no norm has changed by more than the factor ``norm_ratio`` where that is given.

    The cosine is taken of rotated queries, which is what the attention sees: two equal tokens at different places
    differ by their rotation. ``centred`` takes it of what differs from the mean query so far: where queries have a
    large bias, all of them are alike without that.
    """

    tau: float
    norm_ratio: float | None = None
    centred: bool = False

    def nearness(self, query: Tensor, anchors: Tensor, *, shared_rows: int = 1) -> Tensor:
        """Mean cosines of queries [rows, R, D] with each of A earlier ones [rows, A, R, D], fp32 [rows, A]; -inf where
        a norm has changed too much."""
        cosine = torch.cosine_similarity(query[:, None], anchors, dim=-1)
        near = cosine.unflatten(0, (-1, shared_rows)).mean((1, 3))
        if self.norm_ratio is not None:
            change = (query.norm(dim=-1)[:, None] / anchors.norm(dim=-1)).log().abs()
            far = change.unflatten(0, (-1, shared_rows)).amax((1, 3)) > math.log(self.norm_ratio)
            near = near.masked_fill(far, -torch.inf)
        by_row: Tensor = near.repeat_interleave(shared_rows, 0)
        return by_row

    def passes(self, query: Tensor, anchor: Tensor, *, shared_rows: int = 1) -> Tensor:
        """Queries [rows, R, D] against one earlier one each, bool [rows]."""
        return self.nearness(query, anchor[:, None], shared_rows=shared_rows)[:, 0] > self.tau


@dataclass(frozen=True)
class Dilation:
    """The best ``hits`` (a share) of a row's pages bring their neighbours up to ``reach`` pages away."""

    hits: float
    reach: int

    def dilated(self, ranking: Tensor, counts: Tensor) -> Tensor:
        """A ranking [rows, P] by which each row takes as many slices as before, ``counts`` int64 [rows]: the best hits,
        then neighbours, nearest first, then the other hits."""
        n_pages = ranking.shape[1]
        order = ranking.argsort(dim=1, descending=True)
        place = torch.arange(n_pages, device=ranking.device)
        rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order))
        chosen = (rank < counts[:, None]) & ~ranking.isneginf()
        best = chosen & (rank < (counts * self.hits).long()[:, None])
        priority = torch.where(chosen, -rank.float() - 1, -torch.inf)  # below every neighbour
        for distance in range(self.reach, 0, -1):
            beside = torch.zeros_like(best)
            beside[:, distance:] |= best[:, :-distance]
            beside[:, :-distance] |= best[:, distance:]
            priority = priority.masked_fill(beside, 1 / (1 + distance))
        return priority.masked_fill(best, 1.0)


class Reusing(Chooser):
    """The ranking of pages by a block's first step, the anchor, serves its other steps.

    A row keeps the newest ``n_anchors`` queries that it was scored for, with their rankings, and takes the ranking of
    the nearest one. If that fails the gate, the row is scored anew, for as many slices as it had in the anchor step;
    where no row of a sequence passes, its block begins anew. With ``dilation`` the steps behind the anchor read
    neighbours of its best pages instead of its worst pages: a step never reads more than its block's first, and less
    where the layer's page filter has come to put some of these last. Rows that must agree (``shared_rows`` in a row)
    pass or fail together. A budget for everything is the wrapped chooser's.

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
        n_anchors: int = 1,
    ) -> None:
        self._inner, self._block, self._gate, self._dilation = inner, block, gate, dilation
        self._shared_rows, self._n_anchors = shared_rows, n_anchors
        self.restart()

    def restart(self) -> None:
        self._inner.restart()
        self._ages: list[int] = []  # steps of each sequence's block so far
        self._anchors: _Anchors | None = None
        self._counts = torch.zeros(0, dtype=torch.int64)  # slices of each row in the block's first step
        self._stale: Tensor | None = None
        self._mean, self._n_queries = torch.zeros(()), 0  # of the queries so far, [rows, R, D]

    @property
    def resident_bytes(self) -> int:  # type: ignore[override]
        mean = tensor_bytes(self._mean) if self._n_queries else 0
        return 0 if self._anchors is None else mean + tensor_bytes(self._anchors.queries, self._anchors.rankings)

    def forget(self, rows: Tensor) -> None:
        self._stale = rows if self._stale is None else self._stale | rows

    def rank(self, layer: LayerCache, scores: Tensor, anchor_lse: Tensor) -> Tensor:
        return self._inner.rank(layer, scores, anchor_lse)

    def choose(self, layer: LayerCache, query: Tensor, anchor_lse: Tensor) -> tuple[Selection, Tensor]:
        rows = layer.geometry.rows
        if query.shape[0] > rows or layer.reads_everything:
            return self._inner.choose(layer, query, anchor_lse)
        self._add_to_mean(query)
        if self._anchors is None:
            return self._begin(layer, query, anchor_lse)
        failed, nearest = self._nearest(query, self._anchors)
        n_failed = self._note(failed)
        if sum(n_failed) == rows:
            return self._begin(layer, query, anchor_lse)
        inherited = self._anchors.ranking(nearest, layer.n_pages)
        if self._dilation is not None:
            inherited = self._dilation.dilated(inherited, self._counts)
        inherited = layer.filtered(inherited[:, None])[:, 0]
        if sum(n_failed) == 0:
            return Selection(*take_best(inherited, self._counts)), self._scores(layer, query)
        failed = failed.to(layer.selector.device)
        scores = self._renew(layer, query, anchor_lse, failed, sum(n_failed))
        ranking = self.rank(layer, scores, anchor_lse)
        self._anchors = self._anchors.with_new(query, ranking, failed)
        return Selection(*take_best(torch.where(failed[:, None], ranking, inherited), self._counts)), scores

    def _note(self, failed: Tensor) -> list[int]:
        """How many rows of each sequence must be scored by ``failed`` bool [rows], in which all rows of those whose
        block is over fail from now on; where all of them do, another block begins. Waits for the device."""
        by_sequence = failed.view(len(self._ages), -1)
        over = [i for i, age in enumerate(self._ages) if age == self._block]
        if over:
            by_sequence[over] = True
        n_failed: list[int] = by_sequence.sum(1).tolist()
        self._ages = [1 if n == by_sequence.shape[1] else age + 1 for n, age in zip(n_failed, self._ages, strict=True)]
        return n_failed

    def _renew(self, layer: LayerCache, query: Tensor, anchor_lse: Tensor, failed: Tensor, n_failed: int) -> Tensor:
        """The scores of a step in which some rows need them; sequences that begin a block get the wrapped chooser's
        numbers of slices."""
        if 1 not in self._ages:
            return layer.score(query, n_failed)
        rows, before = layer.geometry.rows, layer.meter.scored_rows
        selection, scores = self._inner.choose(layer, query, anchor_lse)
        layer.meter.scored_rows = before + (layer.meter.scored_rows - before) * n_failed // rows
        begins = failed.view(len(self._ages), -1).all(1).repeat_interleave(rows // len(self._ages))
        self._counts = torch.where(begins, selection.row_ids.bincount(minlength=rows), self._counts)
        return scores

    def _nearest(self, query: Tensor, anchors: "_Anchors") -> tuple[Tensor, Tensor]:
        """Which rows must be scored anew, bool [rows], and each row's nearest anchor, int64 [rows]."""
        failed, nearest = (torch.zeros(query.shape[0], dtype=t, device=query.device) for t in (torch.bool, torch.int64))
        if self._gate is not None:
            earlier = anchors.queries
            if self._gate.centred:
                query, earlier = query - self._mean, earlier - self._mean[:, None]
            nearness, nearest = self._gate.nearness(query, earlier, shared_rows=self._shared_rows).max(1)
            failed = nearness <= self._gate.tau
        if self._stale is not None:
            together = self._stale.view(-1, self._shared_rows).any(1)
            failed = failed | together.repeat_interleave(self._shared_rows)
        self._stale = None
        return failed, nearest

    def _add_to_mean(self, query: Tensor) -> None:
        if self._gate is not None and self._gate.centred:
            self._n_queries += 1
            self._mean = self._mean.to(query.device) + (query - self._mean.to(query.device)) / self._n_queries

    def _begin(self, layer: LayerCache, query: Tensor, anchor_lse: Tensor) -> tuple[Selection, Tensor]:
        selection, scores = self._inner.choose(layer, query, anchor_lse)
        self._ages, self._stale = [1] * layer.geometry.n_sequences, None
        ranking = self.rank(layer, scores, anchor_lse)
        self._counts = selection.row_ids.bincount(minlength=layer.geometry.rows)
        if self._anchors is None:
            self._anchors = _Anchors.of(query, ranking, self._n_anchors)
        else:
            self._anchors = self._anchors.with_new(query, ranking, torch.ones_like(self._counts, dtype=torch.bool))
        return selection, scores

    def _scores(self, layer: LayerCache, query: Tensor) -> Tensor:
        """Nobody looks at them unless the completion does."""
        if layer.completion.uses_scores:
            return layer.score(query)
        return query.new_zeros(1).expand(*query.shape[:2], layer.n_pages)


@dataclass(frozen=True)
class _Anchors:
    """The newest queries that each row was scored for, [rows, A, R, D], newest first, with what pages were ranked by,
    fp32 [rows, A, P] on the selector's device."""

    queries: Tensor
    rankings: Tensor

    @staticmethod
    def of(query: Tensor, ranking: Tensor, n_anchors: int) -> "_Anchors":
        return _Anchors(*(t[:, None].repeat(1, n_anchors, *[1] * (t.dim() - 1)) for t in (query, ranking)))

    def ranking(self, nearest: Tensor, n_pages: int) -> Tensor:
        """Of each row's anchor ``nearest`` int64 [rows]; pages that have sealed since come last."""
        mine = self.rankings[torch.arange(len(nearest), device=self.rankings.device), nearest.to(self.rankings.device)]
        return F.pad(mine, (0, n_pages - mine.shape[1]), value=-torch.inf)

    def with_new(self, query: Tensor, ranking: Tensor, rows: Tensor) -> "_Anchors":
        """With one more anchor in the rows where bool [rows] is true; their oldest goes."""
        older = F.pad(self.rankings, (0, ranking.shape[1] - self.rankings.shape[2]), value=-torch.inf)
        queries = torch.cat([query[:, None], self.queries[:, :-1]], 1)
        rankings = torch.cat([ranking[:, None], older[:, :-1]], 1)
        return _Anchors(
            torch.where(rows.to(query.device)[:, None, None, None], queries, self.queries),
            torch.where(rows.to(ranking.device)[:, None, None], rankings, older),
        )
