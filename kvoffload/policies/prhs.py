"""``prhs``: Pre-hoc Sparsity (arXiv:2602.08329): sets are chosen before scoring, from the block's first step (CIS,
"Clustered Indices Sharing"), the layer's depth (PSAW, "Progressive Sliding Attention Window") and, in prefill, the
depth again (ETF, "Early Token Freezing").

Built from notes on the paper's method section. Its values of the block, of phi, alpha, psi, gamma and of the first
layer were not to be had: they are parameters here. Deviations: the unit that is inherited and dilated is a page, the
gate is one answer a kv head (the mean cosine of its group), and dilation replaces an anchor step's worst pages
(the paper's budget-matched CIS*), because a step may not read more than its budget. The error budget that makes the
promise checkable is ``max_dropped_mass``, with this policy or without.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvoffload.attention.layer import LayerCache
from kvoffload.policies.base import Depth, Freezing, Policy, PolicyConfigBase
from kvoffload.policies.reuse import Dilation, QueryGate, Reusing


class PrhsPolicyConfig(PolicyConfigBase):
    """CIS: blocks of ``block`` steps, gate ``tau`` (of ``centred`` queries: see QueryGate), ``anchors`` scored queries
    kept of each head (1 as in the paper; with more, a head inherits from the most similar one), the best ``hits`` of
    the pages dilated by ``reach`` pages. The paper dilates the best third of the tokens by one: one in eight of those
    lies at an edge of its page of 16.

    ``tau`` is the paper's 0.8, too low where queries have a large bias. On Qwen2.5-Coder-0.5B at a budget of 2% it
    has a KL to dense of .40 where plain Top-K has .12 (0.9: .15; 32 positions), while 0.93 is level with plain (.0594
    and .0604; 128 positions) at 68% of the scorings.

    PSAW: from layer ``window_from`` on (counted from 1; 0 is off), keeping ``window_keep`` (phi) ^ ``window_power``
    (alpha) of the context in the last layer. ETF: the same with ``freeze_*`` (psi, gamma), freezing hidden states or
    sharing the first layer's K and V; only in prefills of its own."""

    kind: Literal["prhs"] = "prhs"
    block: int = Field(16, ge=1)
    tau: float = Field(0.8, ge=-1, le=1)
    centred: bool = False
    anchors: int = Field(1, ge=1, le=256)
    hits: float = Field(1 / 24, ge=0, le=1)
    reach: int = Field(1, ge=0)
    window_from: int = Field(0, ge=0)
    window_keep: float = Field(0.5, gt=0, le=1)
    window_power: float = Field(1.0, ge=0)
    freeze: Literal["hidden", "kv"] = "hidden"
    freeze_from: int = Field(0, ge=0)
    freeze_keep: float = Field(0.5, gt=0, le=1)
    freeze_power: float = Field(1.0, ge=0)

    def build(self) -> Policy:
        return Prhs(self)


class Prhs(Policy):
    def __init__(self, config: PrhsPolicyConfig) -> None:
        self._config = config
        if config.freeze_from:
            self.freezing = Freezing(config.freeze, config.freeze_from, config.freeze_keep, config.freeze_power)

    def attach(self, layer: LayerCache, depth: Depth) -> None:
        config = self._config
        if config.window_from:
            layer.page_filter = SlidingWindow(config, depth)
        if config.block > 1:
            dilation = Dilation(config.hits, config.reach) if config.hits and config.reach else None
            layer.chooser = Reusing(
                layer.chooser,
                block=config.block,
                gate=QueryGate(config.tau, centred=config.centred),
                dilation=dilation,
                n_anchors=config.anchors,
            )


class SlidingWindow:
    """PSAW as a page filter: pages that end below the layer's first position come last. They are read only if the
    budget buys every page above, and otherwise belong to the remainder, which the completion stands for (without one
    they are not attended, as in the paper). Sinks are anchors and stay."""

    def __init__(self, config: PrhsPolicyConfig, depth: Depth) -> None:
        self._config, self._depth = config, depth

    def __call__(self, layer: LayerCache, scores: Tensor) -> Tensor:
        config, size = self._config, layer.geometry.page_size
        first = first_position(
            self._depth, layer.n_tokens, start=config.window_from, keep=config.window_keep, power=config.window_power
        )
        n_below = min(max(first - layer.anchors.n_sinks, 0) // size, scores.shape[-1])
        if n_below == 0:
            return scores
        return torch.cat([torch.full_like(scores[..., :n_below], -torch.inf), scores[..., n_below:]], -1)


def first_position(depth: Depth, n_tokens: int, *, start: int, keep: float, power: float) -> int:
    """floor((1 - keep^(power (l - start) / (N - start))) t) for the l-th of N layers (from 1); 0 up to layer
    ``start``. Tokens below it are left out (PSAW) or frozen (ETF)."""
    place = depth.place + 1
    if place <= start:
        return 0
    kept: float = keep ** (power * (place - start) / (depth.count - start))
    return math.floor((1 - kept) * n_tokens)
