"""Shares of pages in two launches of Triton: the total mass of every head, then every page's share over the heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload_kernels.tiles import MAX_HEADS, finite, log_of

_BLOCK = 4096  # pages that a program adds up at a time
_PAGES = 256  # whose shares one program gives


@triton.jit  # type: ignore[untyped-decorator]
def _totals(scores, anchor_lse, out, n_pages, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The log mass of anchors and pages of one head."""
    head = tl.program_id(0).to(tl.int64)
    top, mass = tl.load(anchor_lse + head), tl.full([], 1.0, tl.float32)
    mass = tl.where(top == -float("inf"), 0.0, mass)
    for start in range(0, n_pages, BLOCK):
        page = start + tl.arange(0, BLOCK)
        z = tl.load(scores + head * n_pages + page, mask=page < n_pages, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        shift = finite(new_top)
        mass = mass * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)
        top = new_top
    tl.store(out + head, log_of(mass) + finite(top))


@triton.jit  # type: ignore[untyped-decorator]
def _shares(  # type: ignore[no-untyped-def]
    scores, totals, out, n_pages, HEADS: tl.constexpr, HP: tl.constexpr, PAGES: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    heads, page = tl.arange(0, HP), tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    rows = row * HEADS + heads
    mask = (heads < HEADS)[:, None] & (page < n_pages)[None, :]
    z = tl.load(scores + rows[:, None] * n_pages + page[None, :], mask=mask, other=-float("inf"))
    z -= tl.load(totals + rows, mask=heads < HEADS, other=0.0)[:, None]
    shift = finite(tl.max(z, 0))
    shares = log_of(tl.sum(tl.exp(z - shift[None, :]), 0)) + shift
    tl.store(out + row * n_pages + page, shares, mask=page < n_pages)


def supported(scores: Tensor) -> bool:
    """Whether the kernels take these."""
    return scores.dtype == torch.float32 and scores.is_contiguous() and scores.shape[1] <= MAX_HEADS


def head_totals(scores: Tensor, anchor_lse: Tensor) -> Tensor:
    """The log mass of anchors and pages of every head, fp32 [rows, R]."""
    rows, heads, n_pages = scores.shape
    totals, block = scores.new_empty(rows, heads), min(triton.next_power_of_2(n_pages), _BLOCK)
    _totals[(rows * heads,)](
        scores, anchor_lse.contiguous(), totals, n_pages, BLOCK=block, num_warps=8 if block > 1024 else 4
    )
    return totals


def share_pages(scores: Tensor, anchor_lse: Tensor) -> Tensor:
    """As ``reference.share_pages`` where ``supported``."""
    rows, heads, n_pages = scores.shape
    out = scores.new_empty(rows, n_pages)
    if n_pages > 0:
        totals = head_totals(scores, anchor_lse)
        _shares[(triton.cdiv(n_pages, _PAGES), rows)](
            scores, totals, out, n_pages, HEADS=heads, HP=triton.next_power_of_2(heads), PAGES=_PAGES
        )
    return out
