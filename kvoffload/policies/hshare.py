"""``hshare``: HShare's sharing scheme (official code read), the baseline of PrHS: a critical set serves several steps,
several heads and several layers, without a gate.

Selection itself is whatever is configured (the original scores 16 outlier channels against 4-bit labels). Heads are
kv heads here, since query heads of a group share their pages anyway. Deviations: pairs of layers are neighbours
(the original pairs layers greedily too); heads are paired greedily by the overlap of their sets at the first step
after the prompt, not in prefill.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvoffload.attention.choosing import Chooser
from kvoffload.attention.layer import LayerCache
from kvoffload.buffers import page_mask
from kvoffload.policies.base import Depth, Policy, PolicyConfigBase
from kvoffload.policies.reuse import Reusing
from kvoffload.selection.topk import take_best
from kvoffload.values import Selection


class HsharePolicyConfig(PolicyConfigBase):
    """A set serves ``steps`` steps; with ``heads`` every second kv head and with ``layers`` every second layer takes
    another one's."""

    kind: Literal["hshare"] = "hshare"
    steps: int = Field(2, ge=1)
    heads: bool = True
    layers: bool = True

    def build(self) -> Policy:
        return Hshare(self)


class Hshare(Policy):
    def __init__(self, config: HsharePolicyConfig) -> None:
        self._config = config
        self._last: dict[int, Selection] = {}  # by the layer's place

    def attach(self, layer: LayerCache, depth: Depth) -> None:
        if self._config.heads and layer.geometry.n_kv_heads > 1:
            layer.chooser = PairedHeads(layer.chooser)
        if self._config.steps > 1:
            layer.chooser = Reusing(layer.chooser, block=self._config.steps, gate=None)
        if self._config.layers:
            layer.chooser = PairedLayers(layer.chooser, self._last, depth.place)


class PairedHeads(Chooser):
    """Half of a sequence's kv heads, rounded down, read the pages of the head whose set overlapped most with theirs,
    and are not scored. Every head has an equal part of the budget."""

    single_steps = True

    def __init__(self, inner: Chooser) -> None:
        self._inner = inner
        self._leaders: Tensor | None = None  # the row whose set each row takes, int64 [rows]

    def restart(self) -> None:
        self._inner.restart()
        self._leaders = None

    def rank(self, layer: LayerCache, scores: Tensor, anchor_lse: Tensor) -> Tensor:
        ranking = self._inner.rank(layer, scores, anchor_lse)
        several = self._leaders is None or len(self._leaders) != len(ranking)
        return ranking if several or self._leaders is None else ranking[self._leaders]

    def choose(self, layer: LayerCache, query: Tensor, anchor_lse: Tensor) -> tuple[Selection, Tensor]:
        rows, n_heads = layer.geometry.rows, layer.geometry.n_kv_heads
        if query.shape[0] > rows or layer.reads_everything:
            return self._inner.choose(layer, query, anchor_lse)
        scored = rows if self._leaders is None else int(self._leaders.unique().numel())
        scores = layer.score(query, scored)
        ranking = self._inner.rank(layer, scores, anchor_lse)
        counts = torch.full_like(ranking[:, 0], layer.budget(layer.n_tokens) // n_heads)
        if self._leaders is None:
            row_ids, page_ids = take_best(ranking, counts)
            self._leaders = pair_heads(page_mask(page_ids, row_ids, rows, ranking.shape[1]), n_heads)
        return Selection(*take_best(ranking[self._leaders], counts)), scores


def pair_heads(chosen: Tensor, n_heads: int) -> Tensor:
    """Greedy pairs of a sequence's heads by the overlap of their sets, bool [rows, P]: the row whose set each row
    takes, int64 [rows]. The first of a pair leads."""
    sets = chosen.float().view(-1, n_heads, chosen.shape[1])
    leaders = []
    for number, overlap in enumerate((sets @ sets.mT).tolist()):
        leader = list(range(n_heads))
        pairs = sorted(((overlap[a][b], -a, -b) for a in range(n_heads) for b in range(a + 1, n_heads)), reverse=True)
        free = set(leader)
        for _, a, b in pairs:
            if {-a, -b} <= free:
                free -= {-a, -b}
                leader[-b] = -a
        leaders += [number * n_heads + head for head in leader]
    return torch.tensor(leaders, device=chosen.device)


class PairedLayers(Chooser):
    """Every second layer reads the pages that the layer before it read in the same step, and scores none."""

    single_steps = True

    def __init__(self, inner: Chooser, last: dict[int, Selection], place: int) -> None:
        self._inner, self._last, self._place = inner, last, place

    def restart(self) -> None:
        self._inner.restart()

    def rank(self, layer: LayerCache, scores: Tensor, anchor_lse: Tensor) -> Tensor:
        return self._inner.rank(layer, scores, anchor_lse)

    def choose(self, layer: LayerCache, query: Tensor, anchor_lse: Tensor) -> tuple[Selection, Tensor]:
        if query.shape[0] > layer.geometry.rows or layer.reads_everything:
            return self._inner.choose(layer, query, anchor_lse)
        if self._place % 2 and (taken := self._last.get(self._place - 1)) is not None:
            if layer.completion.uses_scores:
                return taken, layer.score(query)
            return taken, query.new_zeros(1).expand(*query.shape[:2], layer.n_pages)
        selection, scores = self._inner.choose(layer, query, anchor_lse)
        self._last[self._place] = selection
        return selection, scores
