"""Tilted sums of pages, and their removal from a fixed-size summary (kernels/README.md, "Completion")."""

import torch
from torch import Tensor


def tilted_sums(keys: Tensor, values: Tensor, log_weight: Tensor) -> Tensor:
    """Sums over the tokens of a page of w, w k and w v with w = exp(log_weight): keys [..., S, D], values [..., S,
    Dv] and log_weight fp32 [..., S] (-inf leaves a token out) to fp32 [..., 1 + D + Dv]."""
    weight = log_weight.exp()[..., None, :]
    return torch.cat([weight.sum(-1), (weight @ keys.float())[..., 0, :], (weight @ values.float())[..., 0, :]], dim=-1)


def remove_slices(state: Tensor, sums: Tensor, row_ids: Tensor, segment_ids: Tensor) -> Tensor:
    """A copy of state [rows, M, C] with sums [F, C] subtracted at (row_ids, segment_ids), int64 [F] each; fp32."""
    n_segments = state.shape[1]
    return state.flatten(0, 1).index_add(0, row_ids * n_segments + segment_ids, sums, alpha=-1).view_as(state)
