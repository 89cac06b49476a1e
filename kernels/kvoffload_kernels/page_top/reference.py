"""Top-K of pages by their shares (kernels/README.md, "Top pages")."""

import torch
from torch import Tensor

from kvoffload_kernels.page_shares.reference import share_pages

LEAST, STEPS = -60.0, 64
"""Log shares are told apart from ``LEAST`` nats on, in steps of 1 / ``STEPS``."""
TOP_KEY = 4095


def share_keys(shares: Tensor) -> Tensor:
    """Log shares as what they are ordered by: 0 for -inf, else 1 to ``TOP_KEY``, int64."""
    keys = ((shares.nan_to_num(neginf=LEAST) - LEAST) * STEPS).floor().clamp(1, TOP_KEY).long()
    return keys.masked_fill(shares.isneginf(), 0)


def top_pages(
    scores: Tensor, anchor_lse: Tensor, n_heads: int, n_slices: int, n_wanted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows and pages of the ``n_slices`` pages with the largest shares in each list: log masses fp32 [rows, R, P] and
    those of the anchors [rows, R], the rows of ``n_heads`` heads after each other a list, to int64 [lists * n_slices]
    each, a list after the other and in its order. Shares that differ by less than a step (``share_keys``) count as
    equal; of equal ones the first are taken. With ``n_wanted`` int64 [] only so many of each list are, and come first;
    bool [lists * n_slices] says which. The others are page 0 of the list's last row."""
    shares = share_pages(scores, anchor_lse)
    keys = share_keys(shares).view(-1, n_heads * shares.shape[1])
    best = keys.sort(dim=-1, descending=True, stable=True).indices[:, :n_slices]
    place = torch.arange(n_slices, device=scores.device)
    wanted = None if n_wanted is None else (place < n_wanted).expand_as(best)
    chosen = best if wanted is None else torch.where(wanted, best, keys.shape[1])
    chosen = chosen.sort(-1).values
    chosen = torch.where(chosen < keys.shape[1], chosen, keys.shape[1] - shares.shape[1])
    first = torch.arange(len(keys), device=scores.device)[:, None] * n_heads
    rows, pages = first + chosen // shares.shape[1], chosen % shares.shape[1]
    return rows.flatten(), pages.flatten(), None if wanted is None else wanted.flatten()
