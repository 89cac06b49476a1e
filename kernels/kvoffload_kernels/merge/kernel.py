"""Merging of partials in Triton: the splits of one attention, or a few partials that were made apart."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload_kernels.tiles import finite, log_of

MAX_PARTS = 4
_ROWS = 8  # partials that one program merges


@triton.jit  # type: ignore[untyped-decorator]
def _merge_splits(  # type: ignore[no-untyped-def]
    outputs, lses, out, lse_out, n_splits, HEADS: tl.constexpr, DIM: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, d = tl.arange(0, BLOCK), tl.arange(0, DP)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, n_splits, BLOCK):
        place = (row * n_splits + start + split) * HEADS + head
        top = tl.maximum(top, tl.load(lses + place, mask=start + split < n_splits, other=-float("inf")))
    shift = finite(tl.max(top, 0))
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([DP], tl.float32)
    for start in range(0, n_splits, BLOCK):
        place = (row * n_splits + start + split) * HEADS + head
        weight = tl.exp(tl.load(lses + place, mask=start + split < n_splits, other=-float("inf")) - shift)
        mask = (weight > 0)[:, None] & (d < DIM)[None, :]
        acc += tl.sum(weight[:, None] * tl.load(outputs + place[:, None] * DIM + d[None, :], mask=mask, other=0.0), 0)
        total += weight
    mass = tl.sum(total, 0)
    place = row * HEADS + head
    tl.store(out + place * DIM + d, acc / tl.where(mass > 0, mass, 1.0), mask=d < DIM)
    tl.store(lse_out + place, log_of(mass) + shift)


@triton.jit  # type: ignore[untyped-decorator]
def _weighted(output, weight, places, d, real, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    mask = (real & (weight > 0))[:, None] & (d < DIM)[None, :]
    return weight[:, None] * tl.load(output + places[:, None] * DIM + d[None, :], mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _merge_parts(  # type: ignore[no-untyped-def]
    o0, o1, o2, o3, l0, l1, l2, l3, out, lse_out, n,
    PARTS: tl.constexpr, DIM: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    real = i < n
    a = tl.load(l0 + i, mask=real, other=-float("inf"))
    b = tl.load(l1 + i, mask=real, other=-float("inf"))
    c = tl.load(l2 + i, mask=real & (PARTS > 2), other=-float("inf"))
    e = tl.load(l3 + i, mask=real & (PARTS > 3), other=-float("inf"))
    shift = finite(tl.maximum(tl.maximum(a, b), tl.maximum(c, e)))
    a, b, c, e = tl.exp(a - shift), tl.exp(b - shift), tl.exp(c - shift), tl.exp(e - shift)
    mass = a + b + c + e
    acc = _weighted(o0, a, i, d, real, DIM) + _weighted(o1, b, i, d, real, DIM)
    if PARTS > 2:
        acc += _weighted(o2, c, i, d, real, DIM)
    if PARTS > 3:
        acc += _weighted(o3, e, i, d, real, DIM)
    acc = acc / tl.where(mass > 0, mass, 1.0)[:, None]
    tl.store(out + i[:, None] * DIM + d[None, :], acc, mask=real[:, None] & (d < DIM)[None, :])
    tl.store(lse_out + i, log_of(mass) + shift, mask=real)


def supported(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> bool:
    """Whether ``merge_parts`` takes so many partials, and these."""
    return 2 <= len(outputs) <= MAX_PARTS and all(tensor.is_contiguous() for tensor in (*outputs, *lses))


def merge_splits(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.merge_splits``; contiguous."""
    rows, n_splits, heads, dim = outputs.shape
    out, lse = outputs.new_empty(rows, heads, dim), lses.new_empty(rows, heads)
    padded = triton.next_power_of_2(dim)
    block = min(16, triton.next_power_of_2(n_splits))
    _merge_splits[(rows, heads)](outputs, lses, out, lse, n_splits, HEADS=heads, DIM=dim, DP=padded, BLOCK=block)
    return out, lse


def merge_parts(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As ``reference.merge_parts`` for 2 to ``MAX_PARTS`` partials, contiguous; those at -inf leave a single other one
    as it is, to the bit."""
    n, dim = lses[0].numel(), outputs[0].shape[-1]
    out, lse = torch.empty_like(outputs[0]), torch.empty_like(lses[0])
    if n == 0:
        return out, lse
    missing = MAX_PARTS - len(outputs)
    parts = [*outputs, *[outputs[0]] * missing, *lses, *[lses[0]] * missing]
    padded = triton.next_power_of_2(dim)
    grid = (triton.cdiv(n, _ROWS),)
    _merge_parts[grid](*parts, out, lse, n, PARTS=len(outputs), DIM=dim, DP=padded, ROWS=_ROWS)
    return out, lse
