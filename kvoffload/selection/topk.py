"""Top-K of pages under a budget that the kv heads of a layer may share."""

import math
from typing import Literal, NamedTuple

import torch
from kvoffload_kernels.dispatch import fuses_top_pages, share_pages, top_pages
from torch import Tensor

from kvoffload.values import Selection

Pool = Literal["layer", "none"]
_FIRST = 1e6  # comes before every log share


class HeadBounds(NamedTuple):
    """What one of the kv heads that share a list gets of it, in multiples of its equal part: ``floor`` for certain,
    ``cap`` at most (None: all of it)."""

    floor: float = 0.0
    cap: float | None = None

    def hold(self, shares: Tensor, part: float) -> Tensor:
        """Log shares [..., P] of each head for equal parts of ``part`` pages, changed so that their order keeps to the
        bounds: the first pages of a head come before all others, those past its cap are out (-inf)."""
        if self == UNBOUNDED:
            return shares
        n_cap = shares.shape[-1] if self.cap is None else min(math.ceil(self.cap * part), shares.shape[-1])
        best = shares.topk(n_cap, dim=-1)
        first = torch.arange(n_cap, device=shares.device) < int(self.floor * part)
        return torch.full_like(shares, -torch.inf).scatter(-1, best.indices, best.values + _FIRST * first)


UNBOUNDED = HeadBounds()


def take_best(ranking: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The ``counts`` int64 [rows] best pages of each row of a ranking [rows, P], as row and page ids int64 [F]; waits
    for the device, once. Pages at -inf are never taken."""
    best = ranking.sort(dim=1, descending=True)
    place = torch.arange(ranking.shape[1], device=ranking.device)
    taken = (place < counts[:, None]) & ~best.values.isneginf()
    row_ids, place = taken.nonzero().unbind(1)
    return row_ids, best.indices[row_ids, place]


def list_sizes(n_slices: int, n_pages: int, n_heads: int, pool: Pool) -> tuple[int, int]:
    """How many lists the kv heads of a sequence have, and how many of ``n_slices`` slices go to each."""
    n_lists = 1 if pool == "layer" else n_heads
    return n_lists, min(n_slices // n_lists, n_pages * n_heads // n_lists)


def select_top(
    scores: Tensor,
    anchor_lse: Tensor,
    *,
    n_sequences: int,
    n_slices: int,
    pool: Pool,
    n_queries: int = 1,
    n_wanted: Tensor | None = None,
    bounds: HeadBounds = UNBOUNDED,
) -> Selection:
    """The ``n_slices`` slices of each sequence and query with the largest share of the total mass, summed over a
    group's query heads.

    scores are log masses fp32 [rows * Q, R, P], anchor_lse [rows * Q, R], both in query rows, as are the ids that come
    out. A head's share of a page is e^(score - z) with z over anchors and pages together. With pool "layer" the kv
    heads of a sequence compete for the slices of one query, within ``bounds``; with "none" each gets its equal part.
    Fixed output size for fixed arguments; no host round trip. With ``n_wanted`` int64 [] only so many of each list are
    wanted. A GPU's kernels take shares that differ by less than 1.6% as equal (kernels/README.md, "Top pages").
    """
    n_pages = scores.shape[-1]
    n_heads = scores.shape[0] // (n_sequences * n_queries)
    n_lists, k = list_sizes(n_slices, n_pages, n_heads, pool)
    if n_queries == 1 and bounds == UNBOUNDED and fuses_top_pages(scores, k):
        row_ids, page_ids, wanted = top_pages(scores, anchor_lse, n_heads // n_lists, k, n_wanted)
        return Selection(row_ids, page_ids, 1, wanted, by_row=True)
    shares = share_pages(scores, anchor_lse).view(n_sequences, n_heads, n_queries, n_pages)
    query_rows = torch.arange(shares.shape[:3].numel(), device=scores.device).view(n_sequences, n_heads, n_queries)
    lists = (n_sequences, n_lists, n_heads // n_lists, n_queries)
    if pool == "layer":
        shares = bounds.hold(shares, k / n_heads)
    shares = shares.view(*lists, n_pages).transpose(2, 3).flatten(3)
    query_rows = query_rows.view(lists).transpose(2, 3)
    chosen = shares.topk(k, dim=-1, sorted=n_wanted is not None).indices  # [B, lists of a sequence, Q, k]
    row_ids, page_ids = query_rows.gather(-1, chosen // n_pages).flatten(), (chosen % n_pages).flatten()
    if n_wanted is None:
        return Selection(row_ids, page_ids, n_queries)
    wanted = (torch.arange(k, device=scores.device) < n_wanted).expand_as(chosen).flatten()
    return Selection(row_ids, torch.where(wanted, page_ids, 0), n_queries, wanted)  # page 0 is there, whatever is not
