"""A completion that is watched: every estimate is compared with the exact remainder, which a second pass over the
stored pages gives."""

from dataclasses import dataclass

import torch
from kvoffload_kernels.dense_attention.reference import soft_cap
from torch import Tensor

from kvoffload.attention.decode import anchor_logits
from kvoffload.attention.layer import LayerCache
from kvoffload.attention.stream import stream
from kvoffload.completion.base import Completion
from kvoffload.values import Fetched, Pages, Partial, by_row, merge

_FIGURES = ("entropy", "error", "selection_error", "remainder", "mass_error")


@dataclass(frozen=True)
class Exact:
    """Of queries [rows * Q, R]: attention to everything, to what was read (anchors and fetched pages) and to the rest,
    and the entropy in nats of the attention to everything."""

    everything: Partial
    read: Partial
    remainder: Partial
    entropy: Tensor


class ObservedCompletion(Completion):
    """Passes everything on to the layer's own completion, which it stands in for, and sums what it sees of each head.

    ``entropy``: nats of the exact attention; ``error`` and ``selection_error``: relative L2 error of the merged output
    with the completion and without; ``remainder``: exact share of the total mass that was not read; ``mass_error``:
    nats by which the remainder's log mass is off, NaN for heads where nothing was estimated.
    """

    def __init__(self, layer: LayerCache) -> None:
        self._layer, self._inner = layer, layer.completion
        self.uses_scores, self.uses_anchor = self._inner.uses_scores, self._inner.uses_anchor
        self._sums: Tensor | None = None  # fp64 [6, rows, R], the last row counts the mass errors
        self._n_steps = 0

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        self._inner.reset(anchor, n_pages=n_pages)

    def absorb(self, pages: Pages) -> None:
        self._inner.absorb(pages)

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        estimate = self._inner.estimate(query, fetched, scores)
        exact = exact_parts(self._layer, query, fetched)
        seen = _compare(exact, estimate).double().unflatten(1, (self._layer.geometry.rows, -1))
        self._sums = seen.sum(2) if self._sums is None else self._sums + seen.sum(2)
        self._n_steps += seen.shape[2]
        return estimate

    @property
    def state_bytes(self) -> int:
        return self._inner.state_bytes

    def means(self) -> dict[str, Tensor]:
        """Over the steps so far, in host memory, fp64 [rows, R] each; nothing before the first step with pages."""
        if self._sums is None:
            return {}
        steps = torch.full_like(self._sums[:-1], self._n_steps)
        steps[-1] = self._sums[-1]
        return dict(zip(_FIGURES, (self._sums[:-1] / steps).cpu(), strict=True))


def exact_parts(layer: LayerCache, query: Tensor, fetched: Fetched) -> Exact:
    """The truth about scaled queries fp32 [rows * Q, R, D] of the newest tokens; the pages stream through the device
    once, as prefill traffic."""
    anchors = anchor_logits(layer, query, layer.anchors.seen(query.shape[0] // layer.geometry.rows))
    read, energies = [Partial.weigh(anchors, layer.anchors.values)], [_energy(anchors)]
    remainder = [Partial.empty(query, layer.geometry.value_dim)]
    was_read, first = fetched.mask(query.shape[0], layer.n_pages), 0
    for pages in stream(layer):
        logits = _page_logits(layer, query, pages)
        energies.append(_energy(logits))
        mine = was_read[:, first : first + pages.n_pages].repeat_interleave(layer.geometry.page_size, 1)[:, None]
        values = pages.values.flatten(1, 2)
        read = [merge([*read, Partial.weigh(logits.masked_fill(~mine, -torch.inf), values)])]
        remainder = [merge([*remainder, Partial.weigh(logits.masked_fill(mine, -torch.inf), values)])]
        first += pages.n_pages
    everything = merge([read[0], remainder[0]])
    mean_logit = merge(energies).output[..., 0]
    return Exact(everything, read[0], remainder[0], everything.lse - mean_logit)


def _page_logits(layer: LayerCache, query: Tensor, pages: Pages) -> Tensor:
    """Logits over a block of pages, fp32 [rows * Q, R, P * S]; -inf for padding."""
    rows = layer.geometry.rows
    keys = pages.keys.float().flatten(1, 2).transpose(-1, -2)
    logits = soft_cap(by_row(query, rows) @ keys, layer.geometry.softcap) + pages.log_valid().flatten(1)[:, None]
    return logits.reshape(*query.shape[:2], -1)


def _energy(logits: Tensor) -> Partial:
    """The mean logit under the softmax of logits [rows * Q, R, N], as a partial whose output has one number."""
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp()
    mean = (weights * logits.masked_fill(logits == -torch.inf, 0.0)).sum(-1)
    return Partial(mean.nan_to_num(0.0)[..., None], lse)


def _compare(exact: Exact, estimate: Partial) -> Tensor:
    """The figures, and whether the mass error counts: fp32 [6, rows * Q, R]."""
    truth, size = exact.everything.output, exact.everything.output.norm(dim=-1).clamp_min(1e-30)
    error = (merge([exact.read, estimate]).output - truth).norm(dim=-1) / size
    selection_error = (exact.read.output - truth).norm(dim=-1) / size
    off = (estimate.lse - exact.remainder.lse).abs()
    finite = estimate.lse.isfinite() & exact.remainder.lse.isfinite()
    remainder = (exact.remainder.lse - exact.everything.lse).exp()
    off = off.masked_fill(~finite, 0.0)
    return torch.stack([exact.entropy, error, selection_error, remainder, off, finite.float()])
