"""Each page's share of the softmax mass of its row (kernels/README.md, "Page shares")."""

import torch
from torch import Tensor


def share_pages(scores: Tensor, anchor_lse: Tensor) -> Tensor:
    """Each page's log share of the total mass, summed over the query heads of a row: log masses fp32 [rows, R, P] and
    those of the anchors [rows, R], of which at least one is finite, to fp32 [rows, P]."""
    total = torch.logaddexp(scores.logsumexp(-1), anchor_lse)
    shares: Tensor = (scores - total[..., None]).logsumexp(1)
    return shares
