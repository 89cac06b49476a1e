"""The per-head gate: at the end of prefill each query head takes the completion, or none, with the least error on the
newest queries, whose exact answers can be had."""

import torch
from kvoffload_kernels.dispatch import attend
from torch import Tensor

from kvoffload.attention.decode import anchor_logits, attend_selected
from kvoffload.attention.layer import LayerCache
from kvoffload.attention.stream import stream
from kvoffload.completion.gated import GatedCompletion
from kvoffload.values import Partial, merge

_N_QUERIES = 64


def choose(layer: LayerCache, gate: GatedCompletion, tail_queries: Tensor, weights: Tensor) -> None:
    """Set ``gate.choice`` by the mean L2 error of the merged output over the newest queries [rows, R, T, D], with
    weights [rows, T] (0 for padding); the reads count as prefill traffic.

    Queries see the whole window, also the few tokens of it that came after them: the same for every choice.
    """
    if layer.n_pages == 0:
        return
    queries = tail_queries[:, :, -_N_QUERIES:].to(layer.anchors.keys.device)
    middle = _exact_middle(layer, queries)
    with layer.fetch.counted_as_prefill():
        errors = [
            _errors(layer, gate, queries[:, :, i], Partial(middle.output[:, :, i], middle.lse[:, :, i]))
            for i in range(queries.shape[2])
        ]
    counted = weights[:, -_N_QUERIES:].to(queries.device).T[:, None, :, None]  # [Q, choices, rows, R]
    gate.choice = (torch.stack(errors) * counted).sum(0).argmin(0)


def _exact_middle(layer: LayerCache, queries: Tensor) -> Partial:
    """Exact partial of queries [rows, R, Q, D] over all sealed pages."""
    geometry = layer.geometry
    partials = []
    for pages in stream(layer):
        valid = None if pages.valid is None else pages.valid.flatten(1)
        keys, values = pages.keys.flatten(1, 2), pages.values.flatten(1, 2)
        part = attend(queries, keys, values, scale=geometry.scale, valid=valid, softcap=geometry.softcap)
        partials.append(Partial(*part))
    return merge(partials)


def _errors(layer: LayerCache, gate: GatedCompletion, query: Tensor, middle: Partial) -> Tensor:
    """Error of every choice for one query [rows, R, D]: fp32 [choices, rows, R]."""
    query = query.float() * layer.geometry.scale
    anchors = Partial.weigh(anchor_logits(layer, query), layer.anchors.values)
    exact = merge([anchors, middle]).output
    read, fetched = attend_selected(layer, query)
    options = gate.estimates(query, fetched)
    return torch.stack([(merge([read, option]).output - exact).norm(dim=-1) for option in options])
