"""``refresh``: RefreshKV (arXiv:2411.05787, from notes and a page-cited re-implementation): most steps attend to a
partial cache, some attend to everything and choose the partial cache anew from the weights just seen.

The partial cache is as many pages of each kv head as the budget buys; a page's score is its largest attention weight,
the maximum over the group's heads. Every ``stride`` steps a layer compares its query (the mean over heads) with that of
its last full step; unless their cosine is above ``cosine``, the step is full: every page streams through the device,
counted as decode reads. Deviations: pages instead of tokens (the pooling over positions goes with it); the first step
after a prompt is full, where the original takes the last prompt token's weights; the partial cache stays in the tier
unless ``gpu_cache`` holds it; new tokens are in the window, which is exact, until they seal, and their pages are chosen
at a full step. With ``mass``, a step is full too once the dropped mass that the completion estimates, meant over heads
and summed over steps, exceeds it (ours).
"""

from typing import Literal

import torch
from kvoffload_kernels.dense_attention.reference import soft_cap
from pydantic import Field
from torch import Tensor

from kvoffload.attention.choosing import Chooser
from kvoffload.attention.layer import LayerCache
from kvoffload.attention.reading import Read, Reading, WrapperReading
from kvoffload.attention.stream import stream
from kvoffload.buffers import tensor_bytes
from kvoffload.policies.base import Depth, Policy, PolicyConfigBase
from kvoffload.selection.topk import take_best
from kvoffload.values import Fetched, Partial, Selection, by_row, merge


class RefreshPolicyConfig(PolicyConfigBase):
    """A check every ``stride`` steps; a full step where the cosine is not above ``cosine``."""

    kind: Literal["refresh"] = "refresh"
    stride: int = Field(5, ge=1)
    cosine: float = Field(0.95, ge=-1, le=1)
    mass: float | None = Field(None, gt=0)

    def build(self) -> Policy:
        return Refresh(self)

    def check(self, *, recent: int, kinds: tuple[str, ...]) -> None:
        if others := [kind for kind in kinds if kind != "resa"]:
            raise ValueError(f"policy refresh: it chooses pages itself, and {others[0]} would too: give one of the two")


class Refresh(Policy):
    def __init__(self, config: RefreshPolicyConfig) -> None:
        self._config = config

    def attach(self, layer: LayerCache, depth: Depth) -> None:
        layer.chooser = PartialCache(layer.chooser)
        layer.reading = RefreshReading(layer.reading, layer.chooser, self._config)


class PartialCache(Chooser):
    """The pages of the last full step; the wrapped chooser's before there was one."""

    single_steps = True

    def __init__(self, inner: Chooser) -> None:
        self._inner = inner
        self.kept: tuple[Tensor, Tensor] | None = None

    @property
    def resident_bytes(self) -> int:  # type: ignore[override]
        return 0 if self.kept is None else tensor_bytes(*self.kept)

    def choose(self, layer: LayerCache, query: Tensor, anchor_lse: Tensor) -> tuple[Selection, Tensor]:
        if self.kept is None or query.shape[0] > layer.geometry.rows or layer.reads_everything:
            return self._inner.choose(layer, query, anchor_lse)
        if layer.completion.uses_scores:
            return Selection(*self.kept), layer.score(query)
        return Selection(*self.kept), query.new_zeros(1).expand(*query.shape[:2], layer.n_pages)

    def rank(self, layer: LayerCache, scores: Tensor, anchor_lse: Tensor) -> Tensor:
        return self._inner.rank(layer, scores, anchor_lse)

    def restart(self) -> None:
        self._inner.restart()
        self.kept = None


class RefreshReading(WrapperReading):
    """Full steps; the wrapped reading for all others."""

    single_steps = True

    def __init__(self, inner: Reading, partial_cache: PartialCache, config: RefreshPolicyConfig) -> None:
        super().__init__(inner)
        self._partial_cache, self._config = partial_cache, config
        self.n_full = 0
        self._query: Tensor | None = None  # of the last full step, the mean over heads, [B, D]
        self._n_steps, self._dropped = 0, torch.zeros(())

    @property
    def resident_bytes(self) -> int:  # type: ignore[override]
        return self.inner.resident_bytes + (0 if self._query is None else tensor_bytes(self._query))

    def attend(self, layer: LayerCache, query: Tensor, anchors: Partial) -> Read:
        if query.shape[0] > layer.geometry.rows or layer.reads_everything:
            return self.inner.attend(layer, query, anchors)
        mean = query.view(layer.geometry.n_sequences, -1, query.shape[-1]).mean(1)
        if self._is_full(mean):
            self._query, self._n_steps, self._dropped = mean, 0, torch.zeros((), device=query.device)
            return self._attend_all(layer, query, anchors)
        self._n_steps += 1
        read = self.inner.attend(layer, query, anchors)
        if self._config.mass is not None:
            total = torch.logaddexp(read.exact.lse, read.remainder.lse)
            self._dropped = self._dropped + (read.remainder.lse - total).exp().mean()
        return read

    def _is_full(self, mean: Tensor) -> bool:
        """Waits for the device at a check."""
        if self._partial_cache.kept is None or self._query is None:
            return True
        if self._config.mass is not None and float(self._dropped) > self._config.mass:
            return True
        if (self._n_steps + 1) % self._config.stride:
            return False
        return bool((torch.cosine_similarity(mean, self._query, dim=-1) <= self._config.cosine).any())

    def _attend_all(self, layer: LayerCache, query: Tensor, anchors: Partial) -> Read:
        """Dense attention; the partial cache is what it weighed most."""
        shape, parts, largest = layer.geometry, [anchors], []
        for pages in stream(layer, layer.fetch.decode):
            keys = pages.keys.flatten(1, 2).float().transpose(-1, -2)
            page_logits = (
                soft_cap(by_row(query, shape.rows) @ keys, shape.softcap) + pages.log_valid().flatten(1)[:, None]
            )
            parts = [merge([*parts, Partial.weigh(page_logits, pages.values.flatten(1, 2))])]
            largest.append(page_logits.unflatten(-1, (-1, shape.page_size)).amax(-1))
        weights = (torch.cat(largest, -1) - parts[0].lse[..., None]).amax(1)
        counts = torch.full_like(weights[:, 0], layer.budget(layer.n_tokens) // shape.n_kv_heads)
        kept = take_best(weights, counts)
        self._partial_cache.kept = kept[0].to(layer.selector.device), kept[1].to(layer.selector.device)
        self.n_full += 1
        none = torch.zeros(0, dtype=torch.int64, device=query.device)
        sizes = ((0, shape.page_size, d) for d in (shape.key_dim, shape.value_dim))
        keys, values = (query.new_zeros(size, dtype=shape.dtype) for size in sizes)
        fetched = Fetched(keys, values, None, none, none)
        scores = query.new_zeros(1).expand(*query.shape[:2], layer.n_pages)
        return Read(parts[0], Partial.empty(query, shape.value_dim), fetched, scores)
