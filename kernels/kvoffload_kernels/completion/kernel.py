"""The estimate of what is left of a row's segments behind the fetched slices, in Triton: one launch sums up what the
slices take away (atomic additions, fp32), one weighs what is left."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload_kernels.completion.reference import EMPTY, SegmentSums, Slices
from kvoffload_kernels.tiles import finite, log_of

_SEGMENTS = 16  # weighed at a time


@triton.jit  # type: ignore[untyped-decorator]
def _remove(  # type: ignore[no-untyped-def]
    anchor, shift, keys, values, valid, places, row_ids, segment_ids, taken, n_segments, key_slice, key_token,
    value_slice, value_token, QUERIES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, VALID: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    query_row = tl.load(row_ids + i)
    row = query_row // QUERIES
    token, d, dv = tl.arange(0, SP), tl.arange(0, DP), tl.arange(0, DVP)
    counts = token < S
    k_mask, v_mask = counts[:, None] & (d < D)[None, :], counts[:, None] & (dv < DV)[None, :]
    held = i
    if PLACED:
        held = tl.load(places + i)
    k = tl.load(keys + held * key_slice + token[:, None] * key_token + d[None, :], mask=k_mask, other=0.0)
    v = tl.load(values + held * value_slice + token[:, None] * value_token + dv[None, :], mask=v_mask, other=0.0)
    k, v = k.to(tl.float32), v.to(tl.float32)
    if VALID:
        counts = counts & (tl.load(valid + i * S + token, mask=counts, other=0) != 0)
    q0 = tl.load(anchor + row * D + d, mask=d < D, other=0.0)
    logits = tl.sum(k * q0[None, :], 1) - tl.load(shift + row)
    weight = tl.exp(tl.where(counts, logits, -float("inf")))
    place = taken + (query_row * n_segments + tl.load(segment_ids + i)) * (D + DV + 2)
    tl.atomic_add(place, tl.sum(weight, 0))
    tl.atomic_add(place + 1 + d, tl.sum(weight[:, None] * k, 0), mask=d < D)
    tl.atomic_add(place + 1 + D + dv, tl.sum(weight[:, None] * v, 0), mask=dv < DV)
    tl.atomic_add(place + 1 + D + DV, tl.sum(counts.to(tl.float32), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _means(  # type: ignore[no-untyped-def]
    sums,
    taken,
    whole,
    left_mass,
    left,
    known,
    there,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Mean of what is left of each segment, fp32 [segments, PADDED], of the whole where that is not known."""
    d = tl.arange(0, PADDED)
    mask = there[:, None] & (d < SIZE)[None, :]
    m = tl.arange(0, there.shape[0])[:, None]
    total = tl.load(sums + m * STRIDE + FIRST + d[None, :], mask=mask, other=0.0).to(tl.float32)
    gone = tl.load(taken + m * (STRIDE + 2) + 1 + FIRST + d[None, :], mask=mask, other=0.0)
    rest = (total - gone) / tl.where(left, left_mass, 1.0)[:, None]
    return tl.where(known[:, None], rest, total / tl.where(whole > 0, whole, 1.0)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _estimate(  # type: ignore[no-untyped-def]
    query, anchor, shift, masses, counts, sums, taken, out, lse_out, n_segments, rounding,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    query_row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, query_head = query_row // QUERIES, query_row * HEADS + head
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    tilt = tl.load(query + query_head * D + d, mask=d < D, other=0.0)
    tilt -= tl.load(anchor + row * D + d, mask=d < D, other=0.0)
    scale = tl.load(shift + row)
    top = tl.full([], -float("inf"), tl.float32)
    mass = tl.zeros([], tl.float32)
    acc = tl.zeros([DVP], tl.float32)
    for first in range(0, n_segments, BLOCK):
        m = first + tl.arange(0, BLOCK)
        there = m < n_segments
        state, gone = row * n_segments + m, (query_row * n_segments + m) * (D + DV + 2)
        whole = tl.load(masses + state, mask=there, other=0.0)
        n_left = tl.load(counts + state, mask=there, other=0.0)
        n_left -= tl.load(taken + gone + 1 + D + DV, mask=there, other=0.0)
        left_mass = whole - tl.load(taken + gone, mask=there, other=0.0)
        left = (n_left > 0.5) & (left_mass > LEAST * whole)
        known = left & (left_mass > rounding * whole)
        base, gone_base = (
            sums + (row * n_segments + first) * (D + DV), taken + (query_row * n_segments + first) * (D + DV + 2)
        )  # fmt: skip
        keys = _means(base, gone_base, whole, left_mass, left, known, there, 0, D, DP, D + DV)
        values = _means(base, gone_base, whole, left_mass, left, known, there, D, DV, DVP, D + DV)
        z = tl.sum(keys * tilt[None, :], 1) + tl.log(tl.where(left, left_mass, 1.0)) + scale
        z = tl.where(left, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        new_shift = finite(new_top)
        kept, p = tl.exp(top - new_shift), tl.exp(z - new_shift)
        mass = mass * kept + tl.sum(p, 0)
        acc = acc * kept + tl.sum(p[:, None] * values, 0)
        top = new_top
    tl.store(out + query_head * DV + dv, acc / tl.where(mass > 0, mass, 1.0), mask=dv < DV)
    tl.store(lse_out + query_head, log_of(mass) + finite(top))


def estimate_rest(query: Tensor, segments: SegmentSums, slices: Slices) -> tuple[Tensor, Tensor]:
    """As ``reference.estimate_rest``; channels of keys and values lie together, the state is contiguous."""
    rows, n_segments = segments.mass.shape
    query_rows, heads, dim = query.shape
    value_dim = segments.sums.shape[-1] - dim
    sizes = {
        "QUERIES": query_rows // rows,
        "D": dim,
        "DP": triton.next_power_of_2(dim),
        "DV": value_dim,
        "DVP": triton.next_power_of_2(value_dim),
    }
    taken = query.new_zeros(query_rows, n_segments, dim + value_dim + 2)
    _take_away(taken, segments, slices, sizes)
    out, lse = query.new_empty(query_rows, heads, value_dim), query.new_empty(query_rows, heads)
    _estimate[(query_rows, heads)](
        query.contiguous(), segments.anchor, segments.shift, segments.mass, segments.counts,
        segments.sums.contiguous(), taken, out,
        lse, n_segments, segments.rounding, HEADS=heads, LEAST=EMPTY, BLOCK=_SEGMENTS, **sizes,
    )  # fmt: skip
    return out, lse


def _take_away(taken: Tensor, segments: SegmentSums, slices: Slices, sizes: dict[str, int]) -> None:
    keys, values, valid = slices.keys, slices.values, slices.valid
    row_ids, segment_ids = slices.row_ids.contiguous(), segments.of_pages(slices.page_ids)
    n, size = row_ids.shape[0], keys.shape[1]
    if n == 0:
        return
    _remove[(n,)](
        segments.anchor, segments.shift, keys, values, keys if valid is None else valid.contiguous().view(torch.uint8),
        row_ids if slices.places is None else slices.places, row_ids, segment_ids, taken, taken.shape[1],
        *keys.stride()[:2], *values.stride()[:2], S=size,
        SP=triton.next_power_of_2(size), VALID=valid is not None, PLACED=slices.places is not None, **sizes,
    )  # fmt: skip
