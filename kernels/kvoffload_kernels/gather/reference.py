"""Gathering of page slices out of a layer's memory."""

import torch
from torch import Tensor


def gather_slices(
    source: Tensor, source_ids: Tensor, out: Tensor, out_ids: Tensor | None = None, wanted: Tensor | None = None
) -> None:
    """Copy source[source_ids[i]] to out[out_ids[i]] for every i with wanted[i]: source [N, bytes] and out [C, bytes]
    uint8, ids int64 [F], wanted bool [F]. None stands for out_ids = 0 .. F - 1, and for all of them wanted. Places that
    are wanted are distinct, and none of the others is among them."""
    if out_ids is None and wanted is None:
        torch.index_select(source, 0, source_ids, out=out[: source_ids.shape[0]])
        return
    if out_ids is None:
        out_ids = torch.arange(source_ids.shape[0], device=source_ids.device)
    slices = torch.index_select(source, 0, source_ids)
    if wanted is not None:  # nothing's shape depends on it: a step of fixed shapes gathers too
        slices = torch.where(wanted[:, None], slices, out.index_select(0, out_ids))
    out.index_copy_(0, out_ids, slices)
