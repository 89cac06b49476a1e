"""Decode attention over a flat list of page slices in Triton: the list is dealt out to rows on the device, each row's
slices are split over programs, and one merge joins the splits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload_kernels.merge.kernel import merge_splits
from kvoffload_kernels.tiles import (
    MAX_HEADS,
    capped,
    halves,
    joined_twice,
    padded_heads,
    product,
    store_partial,
    weighed,
)

_TILE = 64  # tokens of one step of a program, of several slices
_PROGRAMS = 256  # the rows' lists are split into about so many
_CHUNK = 1024  # ids looked at together
_SMALLEST = 8  # tokens of a slice that whole rows are cut into


@triton.jit  # type: ignore[untyped-decorator]
def _lists(row_ids, order, counts, n, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    count = tl.zeros([], tl.int32)
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        mine = (tl.load(row_ids + i, mask=i < n, other=-1) == row).to(tl.int32)
        place = row.to(tl.int64) * n + count + tl.cumsum(mine, 0) - 1
        tl.store(order + place, i, mask=mine > 0)
        count += tl.sum(mine, 0)
    tl.store(counts + row, count)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, valid, places, order, counts, out, lse_out, n, key_slice, key_token, value_slice,
    value_token, HEADS: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, SLICES: tl.constexpr, CAP: tl.constexpr, VALID: tl.constexpr,
    PLACED: tl.constexpr,
):  # fmt: skip
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    T: tl.constexpr = SP * SLICES
    dtype = keys.dtype.element_ty
    h, d, dv, t = tl.arange(0, 2 * HP), tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, T)
    second = (h >= HP)[:, None]
    mask = (h % HP < HEADS)[:, None] & (d < D)[None, :]
    q = tl.load(query + (row * HEADS + h % HP)[:, None] * D + d[None, :], mask=mask, other=0.0)
    q = halves(q, second, dtype)
    count = tl.load(counts + row)
    top = tl.full([2 * HP], -float("inf"), tl.float32)
    mass = tl.zeros([2 * HP], tl.float32)
    acc = tl.zeros([2 * HP, DVP], tl.float32)
    for first in range(split * SLICES, count, tl.num_programs(0) * SLICES):
        place, token = first + t // SP, t % SP
        there = (place < count) & (token < S)
        at = tl.load(order + row * n + place, mask=there, other=0).to(tl.int64)
        page = at
        if PLACED:
            page = tl.load(places + at, mask=there, other=0)
        k_place, v_place = page * key_slice + token * key_token, page * value_slice + token * value_token
        k = tl.load(keys + k_place[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(values + v_place[:, None] + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        if VALID:
            there = there & (tl.load(valid + at * S + token, mask=there, other=0) != 0)
        z = tl.where(there[None, :], capped(joined_twice(product(q, k), HP, T), CAP), -float("inf"))
        top, mass, acc = weighed(z, v, top, mass, acc, second, dtype)
    store_partial(top, mass, acc, out, lse_out, (row * tl.num_programs(0) + split) * HEADS, HEADS, HP, DV, DVP)


def supported(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether ``attend_slices`` below takes these: slices of at most a tile, channels that lie together."""
    near = keys.stride(-1) == 1 and values.stride(-1) == 1 and keys.dtype == values.dtype
    return near and keys.shape[1] <= _TILE and query.shape[1] <= MAX_HEADS


def slice_lists(row_ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Which slices each row has, in order: int32 ([rows, F], of which the first of each row count, and [rows])."""
    n = row_ids.shape[0]
    order, counts = (torch.empty(size, dtype=torch.int32, device=row_ids.device) for size in ((rows, n), (rows,)))
    _lists[(rows,)](row_ids.contiguous(), order, counts, n, CHUNK=_CHUNK)
    return order, counts


def attend_slices(
    query: Tensor, keys: Tensor, values: Tensor, row_ids: Tensor, valid: Tensor | None, softcap: float | None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``reference.attend_slices`` where ``supported``; slices of keys and values may lie apart."""
    rows, heads, dim = query.shape
    size, value_dim = values.shape[1:]
    padded_size = triton.next_power_of_2(size)
    slices = _TILE // padded_size
    n_splits = max(1, min(triton.cdiv(_PROGRAMS, rows), triton.cdiv(row_ids.shape[0], slices)))
    order, counts = slice_lists(row_ids, rows)
    out, lse = query.new_empty(rows, n_splits, heads, value_dim), query.new_empty(rows, n_splits, heads)
    _attend[(n_splits, rows)](
        query.contiguous(), keys, values, counts if valid is None else valid.contiguous().view(torch.uint8),
        row_ids if places is None else places, order, counts, out, lse, row_ids.shape[0], *keys.stride()[:2],
        *values.stride()[:2],
        HEADS=heads, HP=padded_heads(heads), D=dim, DP=max(16, triton.next_power_of_2(dim)), DV=value_dim,
        DVP=max(16, triton.next_power_of_2(value_dim)), S=size, SP=padded_size, SLICES=slices, CAP=softcap or 0.0,
        VALID=valid is not None, PLACED=places is not None,
    )  # fmt: skip
    return merge_splits(out, lse)


def supports_rows(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether ``attend_rows`` below takes these: tokens that lie together and can be cut into equal slices."""
    lies_together = keys.is_contiguous() and values.is_contiguous()
    return lies_together and _cut(keys.shape[1]) >= _SMALLEST and supported(query, keys[:, :1], values[:, :1])


def attend_rows(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """As ``reference.attend_rows`` where ``supports_rows``."""
    rows, n_tokens, _ = keys.shape
    size = _cut(n_tokens)
    per_row = n_tokens // size
    row_ids = torch.arange(rows * per_row, device=keys.device) // per_row
    valid = seen.expand(rows, n_tokens).reshape(-1, size)
    keys, values = (t.view(-1, size, t.shape[-1]) for t in (keys, values))
    return attend_slices(query, keys, values, row_ids, valid, softcap)


def _cut(n_tokens: int) -> int:
    """The largest power of two up to a tile that divides so many tokens."""
    return min(n_tokens & -n_tokens, _TILE)
