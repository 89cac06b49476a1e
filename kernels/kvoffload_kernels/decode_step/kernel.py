"""The beginning and the end of a decode step of fixed shapes in one Triton launch each (slices.py has what is between
them). No program reads what another one of its launch writes, nothing is added atomically: the same bits every time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload_kernels.decode_step.reference import Parts
from kvoffload_kernels.tiles import (
    MAX_HEADS,
    capped,
    finite,
    halves,
    joined_twice,
    log_of,
    padded_heads,
    product,
    store_partial,
    weighed,
)

TILE_BYTES = 16 << 10  # keys of one step of a program: 64 tokens of 128 channels in 16 bits
_MOST_ANCHORS = 512  # one program attends to a row's
_BLOCK = 32  # partials merged at a time


@triton.jit  # type: ignore[untyped-decorator]
def _begin(  # type: ignore[no-untyped-def]
    query, keys, values, anchor_keys, anchor_values, place, seen, scaled, out, lse_out, scale, n_anchors, seen_row,
    HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    T: tl.constexpr, CAP: tl.constexpr, PUT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dtype = anchor_keys.dtype.element_ty
    h, d, dv = tl.arange(0, 2 * HP), tl.arange(0, DP), tl.arange(0, DVP)
    second = (h >= HP)[:, None]
    mask = (h % HP < HEADS)[:, None] & (d < D)[None, :]
    q_place = (row * HEADS + h % HP)[:, None] * D + d[None, :]
    q = tl.load(query + q_place, mask=mask, other=0.0).to(tl.float32) * scale
    if PUT:
        tl.store(scaled + q_place, q, mask=mask & (h < HP)[:, None])
        newest = tl.load(place)
        new_k = tl.load(keys + row * D + d, mask=d < D, other=0.0)
        new_v = tl.load(values + row * DV + dv, mask=dv < DV, other=0.0)
    q = halves(q, second, dtype)
    top = tl.full([2 * HP], -float("inf"), tl.float32)
    mass = tl.zeros([2 * HP], tl.float32)
    acc = tl.zeros([2 * HP, DVP], tl.float32)
    for first in range(0, n_anchors, T):
        token = first + tl.arange(0, T)
        there = token < n_anchors
        old = there
        if PUT:
            old = there & (token != newest)
        at = row * n_anchors + token
        k = tl.load(anchor_keys + at[None, :] * D + d[:, None], mask=old[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(anchor_values + at[:, None] * DV + dv[None, :], mask=old[:, None] & (dv < DV)[None, :], other=0.0)
        if PUT:
            k = tl.where((token == newest)[None, :], new_k[:, None], k)
            v = tl.where((token == newest)[:, None], new_v[None, :], v)
        there = there & (tl.load(seen + row * seen_row + token, mask=there, other=0) != 0)
        z = tl.where(there[None, :], capped(joined_twice(product(q, k), HP, T), CAP), -float("inf"))
        top, mass, acc = weighed(z, v, top, mass, acc, second, dtype)
    if PUT:
        tl.store(anchor_keys + (row * n_anchors + newest) * D + d, new_k, mask=d < D)
        tl.store(anchor_values + (row * n_anchors + newest) * DV + dv, new_v, mask=dv < DV)
    store_partial(top, mass, acc, out, lse_out, row * HEADS, HEADS, HP, DV, DVP)


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


def padded(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def head_sizes(query: Tensor, value_dim: int) -> dict[str, int]:
    heads, dim = query.shape[1:]
    sizes = {"HEADS": heads, "HP": padded_heads(heads), "D": dim, "DP": padded(dim)}
    return sizes | {"DV": value_dim, "DVP": padded(value_dim)}


def _tile(keys: Tensor, values: Tensor) -> int:
    """Tokens of one step of a program."""
    return max(16, min(64, TILE_BYTES // token_bytes(keys, values)))


def token_bytes(keys: Tensor, values: Tensor) -> int:
    """What a token's keys or values take in a program, whichever are more."""
    return padded(max(keys.shape[-1], values.shape[-1])) * keys.element_size()


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
        T=_tile(*anchors), CAP=softcap or 0.0, PUT=True, **head_sizes(query, value_dim),
    )  # fmt: skip
    return output, lse


def attend_rows(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """As ``sparse_decode.reference.attend_rows`` where ``begins``."""
    rows, heads, _ = query.shape
    n_anchors, value_dim = values.shape[1:]
    output, lse = query.new_empty(rows, heads, value_dim), query.new_empty(rows, heads)
    query = query.contiguous()
    _begin[(rows,)](
        query, query, query, keys, values, query, seen.contiguous().view(torch.uint8), query, output, lse, 1.0,
        n_anchors, n_anchors * (seen.shape[0] > 1), T=_tile(keys, values), CAP=softcap or 0.0, PUT=False,
        **head_sizes(query, value_dim),
    )  # fmt: skip
    return output, lse


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
        DVP=padded(value_dim), SHARED=left[0].shape[-2] < heads, BLOCK=_BLOCK,
    )  # fmt: skip
    return out, lse
