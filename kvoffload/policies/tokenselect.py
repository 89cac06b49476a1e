"""``tokenselect``: TokenSelect (arXiv:2411.02886): the softmax of every query head over the middle region is a vote,
the votes of all heads are added, and the best tokens are one set for all heads; the set is kept while queries stay
similar (its "Selection Cache").

A page's vote is the sum of its tokens' votes, so ``page_size = 1`` is the original's unit; with larger pages the
set is one of pages. The selection cache is PrHS' index sharing without blocks and dilation (reuse.py).
Deviations: keys are kept rotated, as the runtime keeps them, so positions are the true ones and not those of the packed
set (which is what lets the original leave the trained range); prefill is exact; no max-pooling over positions.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvoffload.attention.choosing import Chooser
from kvoffload.attention.layer import LayerCache
from kvoffload.policies.base import Depth, Policy, PolicyConfigBase
from kvoffload.policies.reuse import QueryGate, Reusing
from kvoffload.values import Selection


class TokenSelectPolicyConfig(PolicyConfigBase):
    """The selection is kept while the mean cosine of all heads is above ``tau``; 1 chooses in every step (as the
    released server does)."""

    kind: Literal["tokenselect"] = "tokenselect"
    tau: float = Field(0.9, ge=-1, le=1)

    def build(self) -> Policy:
        return TokenSelect(self.tau)


class TokenSelect(Policy):
    replaces_chooser = True

    def __init__(self, tau: float) -> None:
        self._tau = tau

    def attach(self, layer: LayerCache, depth: Depth) -> None:
        layer.chooser = Votes()
        if self._tau < 1:
            gate, rows = QueryGate(self._tau), layer.geometry.n_kv_heads
            layer.chooser = Reusing(layer.chooser, block=None, gate=gate, shared_rows=rows)


class Votes(Chooser):
    """One set a sequence: its pages with the most votes, each read for every kv head."""

    def choose(self, layer: LayerCache, query: Tensor, anchor_lse: Tensor) -> tuple[Selection, Tensor]:
        scores, shape = layer.score(query), layer.geometry
        by_head = self.rank(layer, scores, anchor_lse).view(shape.n_sequences, shape.n_kv_heads, -1, scores.shape[-1])
        k = min(layer.budget(layer.n_tokens) // shape.n_kv_heads, scores.shape[-1])
        chosen = by_head[:, 0].topk(k, dim=-1, sorted=False).indices  # [B, Q, k]
        page_ids = chosen[:, None].expand(-1, shape.n_kv_heads, -1, -1)
        n_queries = page_ids.shape[2]
        row_ids = torch.arange(shape.rows * n_queries, device=scores.device).view(*page_ids.shape[:3], 1)
        return Selection(row_ids.expand_as(page_ids).flatten(), page_ids.flatten(), n_queries), scores

    def rank(self, layer: LayerCache, scores: Tensor, anchor_lse: Tensor) -> Tensor:
        """The votes of a sequence, the same for each of its rows."""
        shape = layer.geometry
        votes = layer.filtered(scores).softmax(-1).nan_to_num(0.0).sum(1)  # a head without real pages has no vote
        by_head = votes.view(shape.n_sequences, shape.n_kv_heads, -1, votes.shape[-1])
        return by_head.sum(1, keepdim=True).expand_as(by_head).reshape(votes.shape)
