"""One decode step of one layer, top to bottom (ARCHITECTURE.md, "One decode step")."""

import torch
from kvoffload_kernels.dense_attention.reference import soft_cap
from kvoffload_kernels.dispatch import attend_rows, attend_slices, fuses_rows
from torch import Tensor

from kvoffload.attention.layer import LayerCache
from kvoffload.cache.arrived import Arrival
from kvoffload.cache.packed import unpack_slices
from kvoffload.values import Fetched, Partial, by_row, merge


def decode(layer: LayerCache, query: Tensor, keys: Tensor, values: Tensor) -> Partial:
    """Attention of the newest Q tokens, each as a step of its own (Q > 1 within ``layer.run_length``): query [rows * Q,
    R, D], keys [rows, Q, D] and values [rows, Q, Dv], rotary applied, to a partial [rows * Q, R]."""
    early = layer.take_early()  # before pages move
    layer.append(keys, values)
    if early is not None and early.choice is None:  # a page has sealed
        choose_early(layer, early.query, n_come=keys.shape[1])
        layer.take_early()
    query = query.float() * layer.geometry.scale
    anchors = attend_anchors(layer, query, layer.anchors.seen(query.shape[0] // layer.geometry.rows))
    if layer.n_pages == 0:
        return anchors
    layer.ask_ahead()
    read = layer.reading.attend(layer, query, anchors)
    result = merge([read.exact, read.remainder])
    layer.count_steps(query, (read.remainder.lse - result.lse).exp())
    return result


def attend_selected(layer: LayerCache, query: Tensor, anchors: Partial) -> tuple[Partial, Fetched, Tensor]:
    """The exact part for scaled queries fp32 [rows * Q, R, D] with their attention to the anchors: that and the
    selected pages; with it those pages and the selector's scores."""
    arrivals, scores = layer.choose(query, anchors.lse)  # asynchronous: bytes move from here on
    partials, fetched = attend_arrivals(layer, query, arrivals)
    return merge([anchors, *partials]), fetched, scores


def choose_early(layer: LayerCache, query: Tensor, *, n_come: int = 0) -> None:
    """Choose and ask for the slices of a step by a guess of its scaled queries, fp32 [rows * Q, R, D], as before its
    tokens came; ``n_come`` are here already. Where a page seals with them, only the guess is kept."""
    if layer.fixed is None and n_come == 0 and layer.anchors.n_unsealing == 0:
        layer.ahead.keep(layer, query, None)
        return
    seen = layer.anchors.seen(1 + n_come)[:, :1] if layer.fixed is None else layer.fixed.seen_before
    layer.n_coming = query.shape[0] // layer.geometry.rows - n_come
    layer.ahead.keep(layer, query, layer.choose(query, attend_anchors(layer, query, seen).lse, early=True))
    layer.n_coming = 0


def attend_arrivals(layer: LayerCache, query: Tensor, arrivals: list[Arrival]) -> tuple[list[Partial], Fetched]:
    """Attention of scaled queries to the slices of a request, one partial for each part of it, and the slices."""
    partials, fetched = [], []
    for arrive in arrivals:  # what the device has already comes first, what had to move is waited for last
        new = land(layer, arrive)
        slices = new.all_keys, new.all_values, new.row_ids, new.valid
        partials.append(Partial(*attend_slices(query, *slices, layer.geometry.softcap, new.places)))
        fetched.append(new)
    return partials, Fetched.join(fetched)


def land(layer: LayerCache, arrive: Arrival) -> Fetched:
    """The slices of an arrival, waited for if they must be."""
    arrived = arrive()
    part, slices = arrived.selection, unpack_slices(arrived.data, layer.geometry)
    valid = layer.slices_valid(part)
    return Fetched(*slices, valid, part.row_ids, part.page_ids, part.wanted, arrived.places, by_row=part.by_row)


def attend_anchors(layer: LayerCache, query: Tensor, seen: Tensor) -> Partial:
    """Attention of scaled queries fp32 [rows * Q, R, D] to the anchor places that ``seen`` bool [rows or 1, Q or 1, A]
    names, a partial [rows * Q, R]."""
    keys, values = layer.anchors.buffers
    if query.shape[0] == keys.shape[0] and fuses_rows(query, keys, values):
        return Partial(*attend_rows(query, keys, values, seen[:, 0], layer.geometry.softcap))
    return Partial.weigh(anchor_logits(layer, query, seen), values)


def anchor_logits(layer: LayerCache, query: Tensor, seen: Tensor) -> Tensor:
    """Logits of scaled queries [rows * Q, R, D] over the anchor places, fp32 [rows * Q, R, A]; -inf where ``seen`` bool
    [rows or 1, Q or 1, A] is false."""
    keys = layer.anchors.keys.float().transpose(-1, -2)
    logits = soft_cap(by_row(query, keys.shape[0]) @ keys, layer.geometry.softcap)
    by_query = logits.view(keys.shape[0], -1, query.shape[1], keys.shape[-1])
    return by_query.masked_fill(~seen[:, :, None], -torch.inf).flatten(0, 1)
