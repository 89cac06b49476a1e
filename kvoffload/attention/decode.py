"""One decode step of one layer, top to bottom (ARCHITECTURE.md, "One decode step")."""

import torch
from kvoffload_kernels.dense_attention.reference import soft_cap
from kvoffload_kernels.sparse_decode.reference import attend_slices
from torch import Tensor

from kvoffload.attention.layer import LayerCache
from kvoffload.cache.fetch import unpack_slices
from kvoffload.values import Fetched, Partial, merge


def decode(layer: LayerCache, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """Attention of one new token: query [rows, R, D], key [rows, 1, D] and value [rows, 1, Dv], rotary applied."""
    layer.append(key, value)
    query = query.float() * layer.geometry.scale
    if layer.n_pages == 0:
        return Partial.weigh(anchor_logits(layer, query), layer.anchors.values)
    exact, fetched = attend_selected(layer, query)
    remainder = layer.completion.estimate(query, fetched)
    result = merge([exact, remainder])
    layer.count_step((remainder.lse - result.lse).exp())
    return result


def attend_selected(layer: LayerCache, query: Tensor) -> tuple[Partial, Fetched]:
    """The exact part for scaled queries fp32 [rows, R, D]: anchors and the selected pages, with the pages
    themselves."""
    logits = anchor_logits(layer, query)
    arrivals = layer.fetch.start(layer.select(query, logits.logsumexp(-1)))  # asynchronous: bytes move from here on
    partials, fetched = [Partial.weigh(logits, layer.anchors.values)], []
    for part, arrive in arrivals:  # what the device has already comes first, what had to move is waited for last
        keys, values = unpack_slices(arrive(), layer.geometry)
        valid = layer.anchors.page_valid(part.page_ids, part.row_ids)
        partials.append(Partial(*attend_slices(query, keys, values, part.row_ids, valid, layer.geometry.softcap)))
        fetched.append(Fetched(keys, values, valid, part.row_ids, part.page_ids))
    return merge(partials), Fetched.join(fetched)


def anchor_logits(layer: LayerCache, query: Tensor) -> Tensor:
    """Logits of scaled queries [rows, R, D] over the anchor places, fp32 [rows, R, A]; -inf where no token is."""
    logits = soft_cap(query @ layer.anchors.keys.float().transpose(-1, -2), layer.geometry.softcap)
    return logits.masked_fill(~layer.anchors.valid()[:, None], -torch.inf)
