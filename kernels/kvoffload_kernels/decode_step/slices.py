"""The slices of a decode step of fixed shapes in one Triton launch, and what is left of the segments behind them in
another; each slice is read once, wherever it is. Slices come by rows: ``row_ids`` ascend."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload_kernels.completion.reference import EMPTY, SegmentSums, Slices, SliceSums, Tilt
from kvoffload_kernels.decode_step.kernel import TILE_BYTES, head_sizes, padded, token_bytes
from kvoffload_kernels.decode_step.reference import Parts
from kvoffload_kernels.tiles import MAX_HEADS, capped, halves, joined_twice, product, store_partial, weighed

_TILE, _PROGRAMS = 32, 512  # tokens of one step of a program, and about how many the rows' slices are split over
_HOST_TILE = 16  # across the link: a program computes while others wait
_CHUNK = 1024  # ids looked at together
_MOST_SLICES, _MOST_TOKENS = 4096, 64  # every program looks at all ids, and takes a slice at a time at least
_MOST_BYTES = 32 << 10  # of a slice's keys, and of the queries: what shared memory has place for
_SLICES = 8  # of a tile
_TAKEN_SLICES = 32  # of a row at a time


@triton.jit  # type: ignore[untyped-decorator]
def _run_of(row, row_ids, n, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the slices of a row begin among all, and how many there are."""
    begin, count = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        rows = tl.load(row_ids + i, mask=i < n, other=-1)
        begin += tl.sum(((rows < row) & (i < n)).to(tl.int32), 0)
        count += tl.sum((rows == row).to(tl.int32), 0)
    return begin, count


@triton.jit  # type: ignore[untyped-decorator]
def _store_sums(  # type: ignore[no-untyped-def]
    k, v, q0, scale, there, at, real, masses, sums, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, SLICES: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Tilted sums of the slices ``at`` [SLICES] that are ``real``: keys [DP, T] and values [T, DVP]."""
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    k, v = k.to(tl.float32), v.to(tl.float32)
    weight = tl.exp(tl.where(there, tl.sum(k * q0[:, None], 0) - scale, -float("inf")))
    key_sums = tl.sum(tl.reshape(k * weight[None, :], [DP, SLICES, SP]), 2)
    value_sums = tl.sum(tl.reshape(v * weight[:, None], [SLICES, SP, DVP]), 1)
    place = sums + at * (D + DV)
    tl.store(place[None, :] + d[:, None], key_sums, mask=(d < D)[:, None] & real[None, :])
    tl.store(place[:, None] + D + dv[None, :], value_sums, mask=real[:, None] & (dv < DV)[None, :])
    tl.store(masses + 2 * at, tl.sum(tl.reshape(weight, [SLICES, SP]), 1), mask=real)
    tl.store(masses + 2 * at + 1, tl.sum(tl.reshape(there.to(tl.float32), [SLICES, SP]), 1), mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, valid, places, row_ids, anchor, shift, out, lse_out, masses, sums, n, key_slice, key_token,
    value_slice, value_token, valid_slice, valid_token, HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, SLICES: tl.constexpr,
    CHUNK: tl.constexpr, CAP: tl.constexpr, VALID: tl.constexpr, PLACED: tl.constexpr, TILTED: tl.constexpr,
):  # fmt: skip
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    T: tl.constexpr = SP * SLICES
    dtype = keys.dtype.element_ty
    h, d, dv, t = tl.arange(0, 2 * HP), tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, T)
    second = (h >= HP)[:, None]
    mask = (h % HP < HEADS)[:, None] & (d < D)[None, :]
    q = tl.load(query + (row * HEADS + h % HP)[:, None] * D + d[None, :], mask=mask, other=0.0)
    q = halves(q, second, dtype)
    top = tl.full([2 * HP], -float("inf"), tl.float32)
    mass = tl.zeros([2 * HP], tl.float32)
    acc = tl.zeros([2 * HP, DVP], tl.float32)
    if TILTED:
        q0, scale = tl.load(anchor + row * D + d, mask=d < D, other=0.0), tl.load(shift + row)
    begin, count = _run_of(row, row_ids, n, CHUNK)
    for first in range(split * SLICES, count, tl.num_programs(0) * SLICES):
        token = t % SP
        there = (first + t // SP < count) & (token < S)
        at = (begin + first + t // SP).to(tl.int64)
        if VALID:  # what does not count is not read
            there = there & (tl.load(valid + at * valid_slice + token * valid_token, mask=there, other=0) != 0)
        page = at
        if PLACED:
            page = tl.load(places + at, mask=there, other=0)
        k_place, v_place = page * key_slice + token * key_token, page * value_slice + token * value_token
        k = tl.load(keys + k_place[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(values + v_place[:, None] + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        z = tl.where(there[None, :], capped(joined_twice(product(q, k), HP, T), CAP), -float("inf"))
        top, mass, acc = weighed(z, v, top, mass, acc, second, dtype)
        if TILTED:
            place = first + tl.arange(0, SLICES)
            ids = (begin + place).to(tl.int64)
            _store_sums(k, v, q0, scale, there, ids, place < count, masses, sums, D, DP, DV, DVP, SLICES, SP)
    store_partial(top, mass, acc, out, lse_out, (row * tl.num_programs(0) + split) * HEADS, HEADS, HP, DV, DVP)


@triton.jit  # type: ignore[untyped-decorator]
def _rest(  # type: ignore[no-untyped-def]
    query, anchor, shift, masses, counts, sums, ends, taken_masses, taken_sums, row_ids, page_ids, out, lse_out, n,
    n_segments, rounding, HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, SLICES: tl.constexpr, CHUNK: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    state = row * n_segments + segment
    stop = tl.load(ends + segment)
    begin = tl.load(ends + segment - 1, mask=segment > 0, other=0)
    q0, scale = tl.load(anchor + row * D + d, mask=d < D, other=0.0), tl.load(shift + row)
    gone_mass, gone_count = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    gone_keys, gone_values = tl.zeros([DP], tl.float32), tl.zeros([DVP], tl.float32)
    first_slice, count = _run_of(row, row_ids, n, CHUNK)
    for first in range(0, count, SLICES):
        i = first_slice + first + tl.arange(0, SLICES)
        real = first + tl.arange(0, SLICES) < count
        page = tl.load(page_ids + i, mask=real, other=-1)
        mine = real & (page >= begin) & (page < stop)
        gone_mass += tl.sum(tl.load(taken_masses + 2 * i, mask=mine, other=0.0), 0)
        gone_count += tl.sum(tl.load(taken_masses + 2 * i + 1, mask=mine, other=0.0), 0)
        place, there = taken_sums + i[:, None].to(tl.int64) * (D + DV), mine[:, None]
        gone_keys += tl.sum(tl.load(place + d[None, :], mask=there & (d < D)[None, :], other=0.0), 0)
        gone_values += tl.sum(tl.load(place + D + dv[None, :], mask=there & (dv < DV)[None, :], other=0.0), 0)
    whole = tl.load(masses + state)
    left_mass, n_left = whole - gone_mass, tl.load(counts + state) - gone_count
    left = (n_left > 0.5) & (left_mass > LEAST * whole)
    known = left & (left_mass > rounding * whole)
    # of what is left, or of the whole where that is not known
    over = tl.where(known, left_mass, tl.where(whole > 0, whole, 1.0))
    taken = tl.where(known, 1.0, 0.0)
    k_sum = tl.load(sums + state * (D + DV) + d, mask=d < D, other=0.0).to(tl.float32)
    v_sum = tl.load(sums + state * (D + DV) + D + dv, mask=dv < DV, other=0.0).to(tl.float32)
    mean = (k_sum - taken * gone_keys) / over
    h = tl.arange(0, HP)
    mask = (h < HEADS)[:, None] & (d < D)[None, :]
    tilt = tl.load(query + (row * HEADS + h)[:, None] * D + d[None, :], mask=mask, other=0.0) - q0[None, :]
    z = tl.sum(tilt * mean[None, :], 1) + tl.log(tl.where(left, left_mass, 1.0)) + scale
    tl.store(lse_out + state * HEADS + h, tl.where(left, z, -float("inf")), mask=h < HEADS)
    tl.store(out + state * DV + dv, (v_sum - taken * gone_values) / over, mask=dv < DV)


def takes_slices(heads: int, keys: Tensor, values: Tensor, n: int) -> bool:
    """Whether the two functions below take n of these: not too many, of a fraction of a tile each."""
    near = keys.stride(-1) == 1 and values.stride(-1) == 1 and keys.dtype == values.dtype
    width = token_bytes(keys, values)
    fits = heads <= MAX_HEADS and max(heads, keys.shape[1]) * width <= _MOST_BYTES
    return near and 2 <= keys.shape[1] <= _MOST_TOKENS and n <= _MOST_SLICES and fits


def attend_slices(
    query: Tensor, keys: Tensor, values: Tensor, row_ids: Tensor, valid: Tensor | None, softcap: float | None,
    places: Tensor | None = None, tilt: Tilt | None = None,
) -> tuple[Parts, SliceSums | None]:  # fmt: skip
    """As ``reference.attend_slices`` where ``takes_slices``, in as many parts as there are splits. Every slice is read
    once, so that keys and values may be pinned host memory."""
    rows, heads, dim = query.shape
    n, size, value_dim = row_ids.shape[0], keys.shape[1], values.shape[-1]
    together = int(triton.next_power_of_2(size))
    tile = min(_TILE if keys.device == query.device else _HOST_TILE, TILE_BYTES // token_bytes(keys, values))
    slices = max(1, min(_SLICES, tile // together))
    n_splits = max(1, min(triton.cdiv(_PROGRAMS, rows), triton.cdiv(n, slices)))
    out, lse = query.new_empty(rows, n_splits, heads, value_dim), query.new_empty(rows, n_splits, heads)
    sums = None if tilt is None else SliceSums(query.new_empty(n, 2), query.new_empty(n, dim + value_dim))
    _attend[(n_splits, rows)](
        query, keys, values, keys if valid is None else valid.view(torch.uint8),
        row_ids if places is None else places, row_ids.contiguous(), *(tilt or (query, query)), out, lse,
        *(sums or (out, out)), n, *keys.stride()[:2], *values.stride()[:2],
        *((0, 0) if valid is None else valid.stride()), S=size, SP=together, SLICES=slices, CHUNK=_chunk(n),
        CAP=softcap or 0.0, VALID=valid is not None, PLACED=places is not None, TILTED=tilt is not None,
        **head_sizes(query, value_dim),
    )  # fmt: skip
    return (out, lse), sums


def rest_of_segments(query: Tensor, segments: SegmentSums, slices: Slices) -> Parts:
    """As ``reference.rest_of_segments`` of slices whose sums are known, at most as many as ``takes_slices`` allows."""
    assert slices.sums is not None, "they came with the attention"
    (rows, n_segments), (_, heads, dim) = segments.mass.shape, query.shape
    value_dim, n = segments.sums.shape[-1] - dim, slices.row_ids.shape[0]
    out, lse = query.new_empty(rows, n_segments, 1, value_dim), query.new_empty(rows, n_segments, heads)
    _rest[(n_segments, rows)](
        query, segments.anchor, segments.shift, segments.mass, segments.counts, segments.sums, segments.ends,
        *slices.sums, slices.row_ids.contiguous(), slices.page_ids.contiguous(), out, lse, n, n_segments,
        segments.rounding, num_warps=1, SLICES=_TAKEN_SLICES, CHUNK=_chunk(n), LEAST=EMPTY,
        **head_sizes(query, value_dim),
    )  # fmt: skip
    return out, lse


def _chunk(n: int) -> int:
    return min(_CHUNK, padded(n))
