"""The parts of a decode step of fixed shapes in one Triton launch each. No program reads what another one of its launch
writes, nothing is added atomically: the same bits every time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload_kernels.completion.reference import EMPTY, SegmentSums, Slices
from kvoffload_kernels.decode_step.reference import Parts
from kvoffload_kernels.tiles import (
    MAX_HEADS,
    capped,
    finite,
    halves,
    joined,
    joined_twice,
    log_of,
    padded_heads,
    product,
)

_TILE = 64  # tokens of one step of a program
_PROGRAMS = 256  # the rows' slices are split over about so many
_CHUNK = 1024  # ids looked at together
_MOST_SLICES = 4096  # every program looks at all ids
_MOST_ANCHORS = 512  # one program attends to a row's
_SLICES = 8  # of a tile: more are not told apart well
_TAKEN_SLICES = 2  # of a segment at a time: as many as leave registers for a second program
_BLOCK = 16  # partials merged at a time


@triton.jit  # type: ignore[untyped-decorator]
def _weighed(z, v, top, mass, acc, second, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A running softmax after one more tile: logits [2 HP, T] and values [T, DVP]."""
    new_top = tl.maximum(top, tl.max(z, 1))
    shift = finite(new_top)
    kept, p = tl.exp(top - shift), tl.exp(z - shift[:, None])
    acc = acc * kept[:, None] + product(halves(p, second, dtype), v)
    return new_top, mass * kept + tl.sum(p, 1), acc


@triton.jit  # type: ignore[untyped-decorator]
def _store_partial(  # type: ignore[no-untyped-def]
    top, mass, acc, out, lse_out, first, HEADS: tl.constexpr, HP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr
):
    """Both halves together, at heads ``first`` and those after it."""
    heads, dv = tl.arange(0, HP), tl.arange(0, DVP)
    mass = tl.max(tl.reshape(mass, [2, HP]), 0)
    lse = log_of(mass) + finite(tl.max(tl.reshape(top, [2, HP]), 0))
    mean = joined(acc, HP, DVP) / tl.where(mass > 0, mass, 1.0)[:, None]
    place = first + heads
    tl.store(out + place[:, None] * DV + dv[None, :], mean, mask=(heads < HEADS)[:, None] & (dv < DV)[None, :])
    tl.store(lse_out + place, lse, mask=heads < HEADS)


@triton.jit  # type: ignore[untyped-decorator]
def _begin(  # type: ignore[no-untyped-def]
    query, keys, values, anchor_keys, anchor_values, place, seen, scaled, out, lse_out, scale, n_anchors, seen_row,
    HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    T: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dtype = anchor_keys.dtype.element_ty
    h, d, dv = tl.arange(0, 2 * HP), tl.arange(0, DP), tl.arange(0, DVP)
    second = (h >= HP)[:, None]
    mask = (h % HP < HEADS)[:, None] & (d < D)[None, :]
    q_place = (row * HEADS + h % HP)[:, None] * D + d[None, :]
    q = tl.load(query + q_place, mask=mask, other=0.0).to(tl.float32) * scale
    tl.store(scaled + q_place, q, mask=mask & (h < HP)[:, None])
    q = halves(q, second, dtype)
    newest = tl.load(place)
    new_k = tl.load(keys + row * D + d, mask=d < D, other=0.0)
    new_v = tl.load(values + row * DV + dv, mask=dv < DV, other=0.0)
    top = tl.full([2 * HP], -float("inf"), tl.float32)
    mass = tl.zeros([2 * HP], tl.float32)
    acc = tl.zeros([2 * HP, DVP], tl.float32)
    for first in range(0, n_anchors, T):
        token = first + tl.arange(0, T)
        there = token < n_anchors
        old = there & (token != newest)
        at = row * n_anchors + token
        k = tl.load(anchor_keys + at[None, :] * D + d[:, None], mask=old[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(anchor_values + at[:, None] * DV + dv[None, :], mask=old[:, None] & (dv < DV)[None, :], other=0.0)
        k = tl.where((token == newest)[None, :], new_k[:, None], k)
        v = tl.where((token == newest)[:, None], new_v[None, :], v)
        there = there & (tl.load(seen + row * seen_row + token, mask=there, other=0) != 0)
        z = tl.where(there[None, :], capped(joined_twice(product(q, k), HP, T), CAP), -float("inf"))
        top, mass, acc = _weighed(z, v, top, mass, acc, second, dtype)
    tl.store(anchor_keys + (row * n_anchors + newest) * D + d, new_k, mask=d < D)
    tl.store(anchor_values + (row * n_anchors + newest) * DV + dv, new_v, mask=dv < DV)
    _store_partial(top, mass, acc, out, lse_out, row * HEADS, HEADS, HP, DV, DVP)


@triton.jit  # type: ignore[untyped-decorator]
def _picked(mine, i, first, SLICES: tl.constexpr, SP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the ids i where ``mine`` those from the ``first``-th on, each for SP tokens: int32 [SLICES * SP]; 0 behind the
    last."""
    rank = tl.where(mine, tl.cumsum(mine.to(tl.int32), 0) - 1, -1)
    wanted = first + tl.arange(0, SLICES)
    ids = tl.sum(tl.where(rank[None, :] == wanted[:, None], i[None, :], 0), 1)
    return tl.reshape(tl.broadcast_to(tl.expand_dims(ids, 1), [SLICES, SP]), [SLICES * SP])


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, valid, places, row_ids, out, lse_out, n, key_slice, key_token, value_slice, value_token,
    valid_slice, valid_token, HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, SLICES: tl.constexpr, CHUNK: tl.constexpr,
    CAP: tl.constexpr, VALID: tl.constexpr, PLACED: tl.constexpr,
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
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        mine = tl.load(row_ids + i, mask=i < n, other=-1) == row
        count = tl.sum(mine.to(tl.int32), 0)
        for first in range(split * SLICES, count, tl.num_programs(0) * SLICES):
            token = t % SP
            there = (first + t // SP < count) & (token < S)
            at = _picked(mine, i, first, SLICES, SP).to(tl.int64)
            page = at
            if PLACED:
                page = tl.load(places + at, mask=there, other=0)
            k_place, v_place = page * key_slice + token * key_token, page * value_slice + token * value_token
            k = tl.load(keys + k_place[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
            v = tl.load(values + v_place[:, None] + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
            if VALID:
                there = there & (tl.load(valid + at * valid_slice + token * valid_token, mask=there, other=0) != 0)
            z = tl.where(there[None, :], capped(joined_twice(product(q, k), HP, T), CAP), -float("inf"))
            top, mass, acc = _weighed(z, v, top, mass, acc, second, dtype)
    _store_partial(top, mass, acc, out, lse_out, (row * tl.num_programs(0) + split) * HEADS, HEADS, HP, DV, DVP)


@triton.jit  # type: ignore[untyped-decorator]
def _rest(  # type: ignore[no-untyped-def]
    query, anchor, shift, masses, counts, sums, ends, keys, values, valid, places, row_ids, page_ids, out, lse_out, n,
    n_segments, rounding, key_slice, key_token, value_slice, value_token, valid_slice, valid_token,
    HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, SLICES: tl.constexpr, CHUNK: tl.constexpr, LEAST: tl.constexpr,
    VALID: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, dv, t = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, SP * SLICES)
    state = row * n_segments + segment
    stop = tl.load(ends + segment)
    begin = tl.load(ends + segment - 1, mask=segment > 0, other=0)
    q0, scale = tl.load(anchor + row * D + d, mask=d < D, other=0.0), tl.load(shift + row)
    gone_mass, gone_count = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    gone_keys, gone_values = tl.zeros([DP], tl.float32), tl.zeros([DVP], tl.float32)
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        page = tl.load(page_ids + i, mask=i < n, other=-1)
        mine = (tl.load(row_ids + i, mask=i < n, other=-1) == row) & (page >= begin) & (page < stop)
        count = tl.sum(mine.to(tl.int32), 0)
        for first in range(0, count, SLICES):
            token = t % SP
            there = (first + t // SP < count) & (token < S)
            at = _picked(mine, i, first, SLICES, SP).to(tl.int64)
            held = at
            if PLACED:
                held = tl.load(places + at, mask=there, other=0)
            k_place, v_place = held * key_slice + token * key_token, held * value_slice + token * value_token
            k = tl.load(keys + k_place[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
            v = tl.load(values + v_place[:, None] + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
            if VALID:
                there = there & (tl.load(valid + at * valid_slice + token * valid_token, mask=there, other=0) != 0)
            k, v = k.to(tl.float32), v.to(tl.float32)
            weight = tl.exp(tl.where(there, tl.sum(k * q0[None, :], 1) - scale, -float("inf")))
            gone_mass += tl.sum(weight, 0)
            gone_count += tl.sum(there.to(tl.float32), 0)
            gone_keys += tl.sum(weight[:, None] * k, 0)
            gone_values += tl.sum(weight[:, None] * v, 0)
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


@triton.jit  # type: ignore[untyped-decorator]
def _largest(lses, first, n, head, HEADS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of n log-sum-exps of one head."""
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, n, BLOCK):
        part = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.load(lses + (first + part) * HEADS + head, mask=part < n, other=-float("inf")))
    return tl.max(top, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _added(  # type: ignore[no-untyped-def]
    outputs, lses, first, n, head, shift, HEADS: tl.constexpr, SHARED: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weighted values [DVP] and the mass of n partials of one head."""
    dv = tl.arange(0, DVP)
    total, acc = tl.zeros([BLOCK], tl.float32), tl.zeros([DVP], tl.float32)
    for start in range(0, n, BLOCK):
        part = start + tl.arange(0, BLOCK)
        place = (first + part) * HEADS + head
        weight = tl.exp(tl.load(lses + place, mask=part < n, other=-float("inf")) - shift)
        if SHARED:
            place = first + part
        mask = (weight > 0)[:, None] & (dv < DV)[None, :]
        acc += tl.sum(weight[:, None] * tl.load(outputs + place[:, None] * DV + dv[None, :], mask=mask, other=0.0), 0)
        total += weight
    return acc, tl.sum(total, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _finish(  # type: ignore[no-untyped-def]
    anchors, anchor_lses, slices, slice_lses, rests, rest_lses, out, lse_out, masses, n_slices, n_rests,
    HEADS: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place, dv = row * HEADS + head, tl.arange(0, DVP)
    anchor_lse = tl.load(anchor_lses + place)
    top = tl.maximum(anchor_lse, _largest(slice_lses, row * n_slices, n_slices, head, HEADS, BLOCK))
    shift = finite(tl.maximum(top, _largest(rest_lses, row * n_rests, n_rests, head, HEADS, BLOCK)))
    weight = tl.exp(anchor_lse - shift)
    acc = weight * tl.load(anchors + place * DV + dv, mask=dv < DV, other=0.0)
    more, read = _added(slices, slice_lses, row * n_slices, n_slices, head, shift, HEADS, False, DV, DVP, BLOCK)
    guess, left = _added(rests, rest_lses, row * n_rests, n_rests, head, shift, HEADS, SHARED, DV, DVP, BLOCK)
    mass = weight + read + left
    tl.store(out + place * DV + dv, (acc + more + guess) / tl.where(mass > 0, mass, 1.0), mask=dv < DV)
    tl.store(lse_out + place, log_of(mass) + shift)
    tl.store(masses + place, tl.load(masses + place) + left / tl.where(mass > 0, mass, 1.0))


def _padded(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def _heads(query: Tensor, value_dim: int) -> dict[str, int]:
    heads, dim = query.shape[1:]
    sizes = {"HEADS": heads, "HP": padded_heads(heads), "D": dim, "DP": _padded(dim)}
    return sizes | {"DV": value_dim, "DVP": _padded(value_dim)}


def begins(query: Tensor, anchors: tuple[Tensor, Tensor]) -> bool:
    """Whether ``begin`` takes these."""
    keys, values = anchors
    near = keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype
    return near and keys.shape[1] <= _MOST_ANCHORS and query.shape[1] <= MAX_HEADS


def begin(
    query: Tensor, keys: Tensor, values: Tensor, anchors: tuple[Tensor, Tensor], place: Tensor, out: Tensor,
    *, seen: Tensor, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``reference.begin`` where ``begins``."""
    rows, heads, _ = query.shape
    n_anchors, value_dim = anchors[1].shape[1:]
    output, lse = out.new_empty(rows, heads, value_dim), out.new_empty(rows, heads)
    _begin[(rows,)](
        query.contiguous(), keys.contiguous(), values.contiguous(), *anchors, place,
        seen.contiguous().view(torch.uint8), out, output, lse, scale, n_anchors, n_anchors * (seen.shape[0] > 1),
        T=_TILE, CAP=softcap or 0.0, **_heads(query, value_dim),
    )  # fmt: skip
    return output, lse


def takes_slices(query: Tensor, keys: Tensor, values: Tensor, n: int) -> bool:
    """Whether the two functions below take n of these: not too many, of a fraction of a tile each."""
    near = keys.stride(-1) == 1 and values.stride(-1) == 1 and keys.dtype == values.dtype
    return near and 2 <= keys.shape[1] <= _TILE and n <= _MOST_SLICES and query.shape[1] <= MAX_HEADS


def _slices(
    keys: Tensor, values: Tensor, valid: Tensor | None, n: int, most: int
) -> tuple[tuple[int, ...], dict[str, int | bool]]:
    """Strides, also of what says which tokens are valid, and sizes of n slices, of which a tile has ``most``."""
    size = keys.shape[1]
    padded = int(triton.next_power_of_2(size))
    strides = (*keys.stride()[:2], *values.stride()[:2], *((0, 0) if valid is None else valid.stride()))
    chunk = min(_CHUNK, _padded(n))
    sizes = {"S": size, "SP": padded, "SLICES": min(most, _TILE // padded), "CHUNK": chunk}
    return strides, sizes | {"VALID": valid is not None}


def attend_slices(
    query: Tensor, keys: Tensor, values: Tensor, row_ids: Tensor, valid: Tensor | None, softcap: float | None,
    places: Tensor | None = None,
) -> Parts:  # fmt: skip
    """As ``sparse_decode.reference.attend_slices`` where ``takes_slices``, in as many parts as there are splits."""
    rows, heads, _ = query.shape
    n, value_dim = row_ids.shape[0], values.shape[-1]
    strides, sizes = _slices(keys, values, valid, n, _SLICES)
    n_splits = max(1, min(triton.cdiv(_PROGRAMS, rows), triton.cdiv(n, sizes["SLICES"])))
    out, lse = query.new_empty(rows, n_splits, heads, value_dim), query.new_empty(rows, n_splits, heads)
    _attend[(n_splits, rows)](
        query, keys, values, keys if valid is None else valid.view(torch.uint8),
        row_ids if places is None else places, row_ids.contiguous(), out, lse, n, *strides, CAP=softcap or 0.0,
        PLACED=places is not None, **sizes, **_heads(query, value_dim),
    )  # fmt: skip
    return out, lse


def rest_of_segments(query: Tensor, segments: SegmentSums, slices: Slices) -> Parts:
    """As ``reference.rest_of_segments`` where ``takes_slices``."""
    rows, n_segments = segments.mass.shape
    value_dim, valid, n = slices.values.shape[-1], slices.valid, slices.row_ids.shape[0]
    strides, sizes = _slices(slices.keys, slices.values, valid, n, _TAKEN_SLICES)
    out, lse = query.new_empty(rows, n_segments, 1, value_dim), query.new_empty(rows, n_segments, query.shape[1])
    _rest[(n_segments, rows)](
        query, segments.anchor, segments.shift, segments.mass, segments.counts, segments.sums, segments.ends,
        slices.keys, slices.values, slices.keys if valid is None else valid.view(torch.uint8),
        slices.row_ids if slices.places is None else slices.places, slices.row_ids.contiguous(),
        slices.page_ids.contiguous(), out, lse, n, n_segments, segments.rounding, *strides, LEAST=EMPTY,
        PLACED=slices.places is not None, **sizes, **_heads(query, value_dim),
    )  # fmt: skip
    return out, lse


def finish(
    anchors: tuple[Tensor, Tensor], slices: Parts, rest: Parts | None, masses: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As ``reference.finish``; all of it contiguous."""
    rows, heads, value_dim = anchors[0].shape
    out, lse = torch.empty_like(anchors[0], dtype=dtype), torch.empty_like(anchors[1])
    n_rests = 0 if rest is None else rest[1].shape[1]
    left = anchors if rest is None else rest
    _finish[(rows, heads)](
        *anchors, *slices, *left, out, lse, masses, slices[1].shape[1], n_rests, HEADS=heads, DV=value_dim,
        DVP=_padded(value_dim), SHARED=left[0].shape[-2] < heads, BLOCK=_BLOCK,
    )  # fmt: skip
    return out, lse
