"""Accuracy mode: a target for the dropped mass instead of a budget for reads (PrHS' promise, arXiv:2602.08329, made
checkable at run time; the way it is kept is ours).

The completion's run-time estimate of what was not read, d = Z_rest / (Z_read + Z_rest), decides for every layer and kv
head (its worst query head) how many pages are read: as long as it is above the target, the head reads its next best
pages, up to a cap. Keeping the read part alone would change the attention weights by exactly d in total variation.
Where the estimate is not to be trusted, audits correct it while generating.
"""

from collections.abc import Callable

import torch
from kvoffload_kernels.dense_attention.reference import soft_cap
from torch import Tensor

from kvoffload.attention.decode import attend_arrivals
from kvoffload.attention.layer import LayerCache
from kvoffload.attention.reading import Read, Reading, WrapperReading, estimate_again
from kvoffload.attention.stream import stream
from kvoffload.buffers import page_mask
from kvoffload.cache.arrived import Traffic
from kvoffload.selection.topk import take_best
from kvoffload.values import Fetched, Partial, Selection, by_row, merge

_GROWTH = 1.5  # pages of a head after a round, by those before it


class Margin:
    """How many nats more than estimated a head's remainder is taken to weigh, learned from audits by adaptive conformal
    inference (arXiv:2106.00170): a miss of the target adds to it what 1 / misses - 1 hits take away, so that over many
    audits no head misses more often than in a share ``misses`` of them, however wrong the estimate is, as long as its
    reads do not end at the cap. It never makes a head read less than the estimate would."""

    _STEP = 0.5  # nats

    def __init__(self, target: float, misses: float) -> None:
        self._target, self._misses = target, misses
        self.nats: Tensor | None = None  # fp32 [rows, R]

    def learn(self, dropped: Tensor) -> None:
        """From the mass that was really dropped, fp32 [rows, R]."""
        before = torch.zeros_like(dropped) if self.nats is None else self.nats
        missed = (dropped > self._target).to(dropped.dtype)
        self.nats = (before + self._STEP * (missed - self._misses)).clamp_min(0)

    def added(self, lse: Tensor) -> Tensor:
        """Log masses [rows * Q, R] with the margin."""
        if self.nats is None:
            return lse
        return lse + self.nats.repeat_interleave(lse.shape[0] // self.nats.shape[0], 0)


class BoundedMass(WrapperReading):
    """Reads on until the estimated dropped mass of every head is at most ``target``, or the head has its part of
    ``cap`` slices. A head that has to read on is scored anew, and again in the next step where selections are reused.

    Each round is a request of its own and needs an answer on the host. With a margin, steps depend on the audits before
    them.
    """

    def __init__(self, inner: Reading, target: float, cap: Callable[[int], int], margin: Margin | None = None) -> None:
        super().__init__(inner)
        self._target, self._cap, self._margin = target, cap, margin
        self._n_capped = 0
        self.single_steps = inner.single_steps or margin is not None

    @property
    def resident_bytes(self) -> int:  # type: ignore[override]
        return self.inner.resident_bytes

    @property
    def n_capped(self) -> int:  # type: ignore[override]
        return self._n_capped

    def attend(self, layer: LayerCache, query: Tensor, anchors: Partial) -> Read:
        read = self.inner.attend(layer, query, anchors)
        more = self._more(layer, query, read)
        if more is None:
            return read
        scores = layer.score(query)
        ranking = layer.chooser.rank(layer, scores, anchors.lse).to(query.device)
        if query.shape[0] == layer.geometry.rows:
            layer.chooser.forget(more > 0)
        scores = scores.to(query.device) if layer.completion.uses_scores else scores
        read = Read(read.exact, read.remainder, read.fetched.clone(), scores)
        while more is not None:
            read = _read_on(layer, query, read, ranking, more)
            more = self._more(layer, query, read)
        return read

    def _more(self, layer: LayerCache, query: Tensor, read: Read) -> Tensor | None:
        """How many slices more each query row reads, int64 [rows * Q]; None where all are done, and
        then those that ended at the cap are counted."""
        rest = read.remainder.lse if self._margin is None else self._margin.added(read.remainder.lse)
        share = (rest - torch.logaddexp(read.exact.lse, rest)).exp().amax(1)
        counts = read.fetched.row_ids.bincount(minlength=query.shape[0])
        most = min(self._cap(layer.n_tokens) // layer.geometry.n_kv_heads, layer.n_pages)
        wanted = (counts * _GROWTH).ceil().long().clamp_min(1).clamp(max=most)
        missed = share > self._target
        more = torch.where(missed, (wanted - counts).clamp_min(0), 0)
        n_more, n_missed = torch.stack([more.sum(), missed.sum()]).tolist()
        self._n_capped += 0 if n_more else n_missed
        return more if n_more else None


def _read_on(layer: LayerCache, query: Tensor, read: Read, ranking: Tensor, more: Tensor) -> Read:
    """With the next ``more`` int64 [rows * Q] best slices of each query row."""
    had = page_mask(read.fetched.page_ids, read.fetched.row_ids, *ranking.shape)
    lowest = torch.finfo(ranking.dtype).min  # pages that a filter puts last are read last, not never
    ranking = ranking.clamp_min(lowest).masked_fill(had, -torch.inf)
    selection = Selection(*take_best(ranking, more), query.shape[0] // layer.geometry.rows)
    partials, fetched = attend_arrivals(layer, query, layer.fetch.start(selection))
    exact = merge([read.exact, *partials])
    joined = Fetched.join([read.fetched, fetched.clone()])
    return Read(exact, estimate_again(layer, query, joined, read.scores), joined, read.scores)


class Audit(WrapperReading):
    """Every ``every`` steps the mass that was really dropped, from one pass over the tier; the step gives what it gave.
    The pass counts as prefill traffic, or where a margin learns from it, as the decode's."""

    def __init__(self, inner: Reading, every: int, margin: Margin | None = None) -> None:
        super().__init__(inner)
        self._every, self._margin = every, margin
        self.single_steps = inner.single_steps
        self.restart()

    @property
    def resident_bytes(self) -> int:  # type: ignore[override]
        return self.inner.resident_bytes

    def restart(self) -> None:
        super().restart()
        self._n_steps = 0

    def attend(self, layer: LayerCache, query: Tensor, anchors: Partial) -> Read:
        read = self.inner.attend(layer, query, anchors)
        n_steps = query.shape[0] // layer.geometry.rows - layer.n_revised
        audited = [i for i in range(n_steps) if (self._n_steps + i + 1) % self._every == 0]
        self._n_steps += n_steps
        if audited:
            traffic = None if self._margin is None else layer.fetch.decode
            mass = dropped_mass(layer, query, read.exact.lse, anchors.lse, traffic)
            of_steps = mass.unflatten(0, (layer.geometry.rows, -1))[:, layer.n_revised :].unbind(1)
            for dropped in [of_steps[i] for i in audited]:
                layer.meter.dropped.append(dropped.cpu())
                if self._margin is not None:
                    self._margin.learn(dropped)
        return read


def dropped_mass(
    layer: LayerCache, query: Tensor, read_lse: Tensor, anchor_lse: Tensor, traffic: Traffic | None = None
) -> Tensor:
    """The share of the total mass that is not behind ``read_lse`` [rows * Q, R], for scaled queries whose anchors
    have mass anchor_lse; fp32 [rows * Q, R]. The reads count as ``traffic``, by default the prefill's."""
    total = anchor_lse
    for pages in stream(layer, traffic):
        keys = pages.keys.float().flatten(1, 2).transpose(-1, -2)
        found = soft_cap(by_row(query, layer.geometry.rows) @ keys, layer.geometry.softcap)
        found = (found + pages.log_valid().flatten(1)[:, None]).logsumexp(-1)
        total = torch.logaddexp(total, found.view(total.shape))
    return 1 - (read_lse - total).exp().clamp(max=1.0)
