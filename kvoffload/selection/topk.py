"""Top-K of pages under a budget that the kv heads of a layer may share."""

from typing import Literal

import torch
from torch import Tensor

from kvoffload.values import Selection

Pool = Literal["layer", "none"]


def select_top(scores: Tensor, anchor_lse: Tensor, *, n_sequences: int, n_slices: int, pool: Pool) -> Selection:
    """The ``n_slices`` slices of each sequence with the largest share of the total mass, summed over a group's query
    heads.

    scores are log masses fp32 [rows, R, P], anchor_lse [rows, R]. A head's share of a page is e^(score - z) with z over
    anchors and pages together. With pool "layer" the kv heads of a sequence compete for the slices; with "none" each
    gets its equal part. Fixed output size for fixed arguments; no host round trip.
    """
    rows, _, n_pages = scores.shape
    n_heads = rows // n_sequences
    total = torch.logaddexp(scores.logsumexp(-1), anchor_lse)
    shares = (scores - total[..., None]).logsumexp(1)  # [rows, P]
    lists, width = (n_sequences, n_heads * n_pages) if pool == "layer" else (rows, n_pages)
    k = min(n_slices if pool == "layer" else n_slices // n_heads, width)
    chosen = shares.reshape(lists, width).topk(k, dim=-1, sorted=False).indices
    flat = (chosen + torch.arange(lists, device=chosen.device)[:, None] * width).flatten()
    return Selection(flat // n_pages, flat % n_pages)
