"""Exact attention of a chunk of new tokens over everything before it, and the summaries that are made when the prompt
is in."""

import torch
from kvoffload_kernels.dispatch import attend
from torch import Tensor

from kvoffload.attention.gate import choose_at_prefill
from kvoffload.attention.layer import Anchored, LayerCache
from kvoffload.attention.sample import take_sample
from kvoffload.attention.stream import stream
from kvoffload.cache.arrived import Traffic
from kvoffload.cache.packed import pack_pages
from kvoffload.values import Partial, merge


def attend_chunk(
    layer: LayerCache, query: Tensor, keys: Tensor, values: Tensor, traffic: Traffic | None = None
) -> Partial:
    """Dense causal attention for a chunk over itself and everything before it: query [rows, R, Q, D], keys [rows, Q,
    D], values [rows, Q, Dv], which are to be taken in afterwards.

    Earlier pages stream through the device block by block (prefill traffic where none is given).
    """
    partials = [_attend(layer, query, keys, values, valid=_chunk_valid(layer, keys.shape[1]), causal=True)]
    if layer.n_tokens:
        anchors = layer.anchors
        partials.append(_attend(layer, query, anchors.keys, anchors.values, valid=_rows(anchors.valid(), layer)))
    for pages in stream(layer, traffic):
        flat = None if pages.valid is None else pages.valid.flatten(1)
        partials.append(_attend(layer, query, pages.keys.flatten(1, 2), pages.values.flatten(1, 2), valid=flat))
        partials = [merge(partials)]
    return merge(partials)


def take_in(layer: LayerCache, newest_queries: Tensor, keys: Tensor, values: Tensor, *, whole: bool) -> None:
    """Add a chunk of a prefill [rows, n, D], [rows, n, Dv], with its newest queries [rows, R, T, D]: full pages leave
    for the store. ``whole`` says that it is all of the prefill and the layer was empty; then it is summarised now, from
    the pages that are on the device still."""
    layer.remember_queries(newest_queries)
    packed = layer.append(keys, values)
    if not whole:
        return
    layer.held = packed
    try:
        prepare(layer)
    finally:
        layer.held = None


def prepare(layer: LayerCache) -> None:
    """Summarise a finished prefill: fix the anchor query, then show every sealed page to selector and completion
    once."""
    if layer.ready:
        return
    weights = _summarise(layer, layer.n_pages)
    if layer.gate is not None and layer.tail_queries is not None:
        choose_at_prefill(layer, layer.gate, layer.tail_queries, weights)
        layer.n_estimated = layer.n_pages


def prepare_again(
    layer: LayerCache, n_prefilled: int, n_estimated: int | None, anchored: Anchored | None, choice: Tensor | None
) -> None:
    """Summaries as they were in a layer that was prepared with ``n_prefilled`` pages, then sealed the others, made its
    first estimate at ``n_estimated`` (None: none yet), was anchored anew by ``anchored``, and whose gate had made that
    ``choice`` (None: it chooses now)."""
    weights = _summarise(layer, n_prefilled, anchored, n_estimated)
    layer.n_estimated = n_estimated
    if layer.gate is not None and choice is not None:
        layer.gate.choice = choice
    elif layer.gate is not None and layer.tail_queries is not None:
        choose_at_prefill(layer, layer.gate, layer.tail_queries, weights)


def _summarise(
    layer: LayerCache, n_prefilled: int, anchored: Anchored | None = None, n_estimated: int | None = None
) -> Tensor:
    """Reset selector and completion and show them every page: the first ``n_prefilled`` in blocks, the others one by
    one, as they seal in decode steps. Gives the weights of the tail queries."""
    assert layer.tail_queries is not None, "a prefill leaves its last queries behind"
    weights = layer.tail_weights()
    mean = torch.einsum("grqd,gq->gd", layer.tail_queries.float().mean(1, keepdim=True), weights)
    mean = mean / weights.sum(1, keepdim=True).clamp_min(1)
    first = Anchored(mean.to(layer.anchors.keys.device) * layer.geometry.scale, n_prefilled)
    layer.selector.reset((anchored or first).query if layer.selector.uses_anchor else first.query)
    if layer.selector.uses_sample and n_prefilled:
        layer.selector.fit(take_sample(layer, layer.tail_queries, weights, n_pages=n_prefilled))
    basis = anchored if anchored is not None and layer.completion.uses_anchor else first
    layer.completion.reset(basis.query, n_pages=basis.n_pages)
    done = 0
    for pages in stream(layer):
        n_block = min(max(n_prefilled - done, 0), pages.n_pages)
        if n_block:
            layer.absorb(pages.run(0, n_block))
        if n_estimated == done + n_block == n_prefilled:
            layer.completion.refresh()
        for i in range(n_block, pages.n_pages):
            layer.absorb(pages.run(i, i + 1))
            if n_estimated is not None and done + i + 1 >= n_estimated:
                layer.completion.refresh()
        done += pages.n_pages
    layer.ready, layer.n_prefilled, layer.anchored, layer.n_estimated = True, n_prefilled, anchored, None
    layer.chooser.restart()
    layer.reading.restart()
    for upkeep in layer.upkeep:
        upkeep.restart()
    return weights


def _attend(
    layer: LayerCache, query: Tensor, keys: Tensor, values: Tensor, *, valid: Tensor | None, causal: bool = False
) -> Partial:
    geometry = layer.geometry
    output = attend(query, keys, values, scale=geometry.scale, causal=causal, valid=valid, softcap=geometry.softcap)
    return Partial(*output)


def _chunk_valid(layer: LayerCache, n_tokens: int) -> Tensor | None:
    """Which of the next ``n_tokens`` tokens are real, bool [rows, n]; None when all are."""
    padding = layer.anchors.padding
    if padding is None:
        return None
    slots = torch.arange(layer.n_tokens, layer.n_tokens + n_tokens, device=padding.device)
    return slots >= padding[:, None]


def _rows(valid: Tensor, layer: LayerCache) -> Tensor:
    return valid.expand(layer.geometry.rows, -1)


def refill(layer: LayerCache, source: LayerCache) -> None:
    """Give an empty layer the tokens of another one with the same page size and anchors; summaries are made anew."""
    for pages in source.fetch.stream(1024):
        layer.meter.written += layer.store.append(layer.layer, pack_pages(pages))
    layer.anchors.copy_from(source.anchors)
    layer.tail_queries, layer.ready = source.tail_queries, False
