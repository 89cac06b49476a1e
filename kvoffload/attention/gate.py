"""The per-head gate: at the end of prefill, and if asked for again while generating, each query head takes the
completion, or none, with the least error on the newest queries, whose exact answers can be had."""

import torch
from kvoffload_kernels.dispatch import attend
from torch import Tensor

from kvoffload.attention.decode import attend_anchors, attend_selected
from kvoffload.attention.layer import LayerCache
from kvoffload.attention.stream import stream
from kvoffload.attention.upkeep import Rhythm, Upkeep
from kvoffload.buffers import tensor_bytes
from kvoffload.completion.gated import GatedCompletion
from kvoffload.values import Partial, merge, query_rows

_BLOCK = 16  # queries that are tried at once


def choose_at_prefill(layer: LayerCache, gate: GatedCompletion, tail_queries: Tensor, weights: Tensor) -> None:
    """Set ``gate.choice`` by the mean L2 error of the merged output over the newest queries [rows, R, T, D], with
    weights [rows, T] (0 for padding); the reads count as prefill traffic."""
    if layer.n_pages == 0:
        return
    device = layer.anchors.keys.device
    with layer.fetch.counted_as_prefill():
        newest = tail_queries[:, :, -gate.n_queries :].to(device)
        _choose(layer, gate, newest, weights[:, -gate.n_queries :].to(device))


class GateRecheck(Upkeep):
    """Makes the choice anew every ``every`` generated tokens, on the newest queries: a dense pass over the tier and a
    step's selection for each of them, all of it counted as decode reads."""

    def __init__(self, every: int, n_queries: int) -> None:
        self._every, self._n_queries = every, n_queries
        self.restart()

    def restart(self) -> None:
        self._rhythm = Rhythm(self._every, self._n_queries)
        self._queries: list[Tensor] = []  # in the model's dtype, not scaled, [rows, R, n, D] each

    @property
    def resident_bytes(self) -> int:  # type: ignore[override]
        return tensor_bytes(*self._queries)

    def run_length(self, layer: LayerCache, n_pages: int) -> int:
        return self._rhythm.left

    def after_steps(self, layer: LayerCache, query: Tensor) -> None:
        kept = self._rhythm.count(query)
        if kept.shape[1]:
            self._queries.append((kept / layer.geometry.scale).to(layer.geometry.dtype).transpose(1, 2))
        if self._rhythm.due and layer.gate is not None:
            queries = torch.cat(self._queries, dim=2)
            _choose(layer, layer.gate, queries, torch.ones(*queries.shape[::2][:2], device=queries.device))
            self._queries = []


def _choose(layer: LayerCache, gate: GatedCompletion, queries: Tensor, weights: Tensor) -> None:
    """From queries [rows, R, T, D] in the model's dtype, not scaled, with weights [rows, T].

    Queries see the whole window, also the few tokens of it that came after them: the same for every choice.
    """
    n_scored = layer.meter.scored_rows
    middle = _exact_middle(layer, queries)
    errors = torch.zeros((), device=queries.device)
    for start in range(0, queries.shape[2], _BLOCK):
        block = slice(start, start + _BLOCK)
        part = Partial(query_rows(middle.output[:, :, block]), query_rows(middle.lse[:, :, block]))
        found = _errors(layer, gate, query_rows(queries[:, :, block]).float() * layer.geometry.scale, part)
        errors = errors + torch.einsum("cgqr,gq->cgr", found, weights[:, block])
    gate.choose(errors)
    layer.meter.scored_rows = n_scored  # that was no step


def _exact_middle(layer: LayerCache, queries: Tensor) -> Partial:
    """Exact partial of queries [rows, R, Q, D] over all sealed pages."""
    geometry, partials = layer.geometry, list[Partial]()
    for pages in stream(layer, layer.fetch.decode):
        valid = None if pages.valid is None else pages.valid.flatten(1)
        keys, values = pages.keys.flatten(1, 2), pages.values.flatten(1, 2)
        part = attend(queries, keys, values, scale=geometry.scale, valid=valid, softcap=geometry.softcap)
        partials = [merge([*partials, Partial(*part)])]
    return partials[0]


def _errors(layer: LayerCache, gate: GatedCompletion, query: Tensor, middle: Partial) -> Tensor:
    """Error of every choice for scaled queries fp32 [rows * Q, R, D] with their exact partials of the pages: fp32
    [choices, rows, Q, R]."""
    anchors = attend_anchors(layer, query, layer.anchors.valid()[:, None])
    exact = merge([anchors, middle]).output
    read, fetched, scores = attend_selected(layer, query, anchors)
    options = gate.estimates(query, fetched, scores)
    errors = torch.stack([(merge([read, option]).output - exact).norm(dim=-1) for option in options])
    return errors.view(len(options), layer.geometry.rows, -1, query.shape[1])
