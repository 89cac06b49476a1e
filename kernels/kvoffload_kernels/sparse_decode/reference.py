"""Decode attention over a flat list of page slices, each of which belongs to one row (sequence x kv head)."""

import torch
from torch import Tensor

from kvoffload_kernels.dense_attention.reference import soft_cap, weigh


def attend_slices(
    query: Tensor, keys: Tensor, values: Tensor, row_ids: Tensor, valid: Tensor | None, softcap: float | None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each row's queries over its own slices.

    query [rows, R, D] fp32, already scaled; keys [F, S, D], values [F, S, Dv], row_ids int64 [F], valid bool [F, S] or
    None. With ``places`` int64 [F] the slices are those among keys [C, S, D] and values [C, S, Dv]. Returns fp32
    ([rows, R, Dv], [rows, R]); a row without a valid token gives (0, -inf).
    """
    if places is not None:
        keys, values = keys.index_select(0, places), values.index_select(0, places)
    rows, group, _ = query.shape
    logits = soft_cap(query[row_ids] @ keys.float().transpose(1, 2), softcap)  # [F, R, S]
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None], -torch.inf)
    top = query.new_full((rows, group), -torch.inf)
    index = row_ids[:, None].expand(-1, group)
    top = top.scatter_reduce(0, index, logits.amax(-1), "amax")
    shift = top.masked_fill(top.isneginf(), 0.0)
    weights = (logits - shift[row_ids][..., None]).exp()
    mass = query.new_zeros(rows, group).index_add_(0, row_ids, weights.sum(-1))
    total = query.new_zeros(rows, group, values.shape[-1]).index_add_(0, row_ids, weights @ values.float())
    return total / mass.clamp_min(torch.finfo(mass.dtype).tiny)[..., None], mass.log() + shift


def attend_rows(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The same over tokens that lie side by side: keys [rows, N, D], values [rows, N, Dv], of which ``seen`` bool [rows
    or 1, N] count."""
    logits = soft_cap(query @ keys.float().mT, softcap).masked_fill(~seen[:, None], -torch.inf)
    return weigh(logits, values)
