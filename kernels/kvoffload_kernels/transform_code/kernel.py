"""Scoring of pages and attention straight from transform-coded keys, in Triton: channels are looked up once for all
query heads of a row, and the query, not the keys, goes through the synthesis matrix."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload_kernels.merge.kernel import merge_splits
from kvoffload_kernels.tiles import (
    MAX_HEADS,
    capped,
    finite,
    halves,
    joined,
    joined_twice,
    log_of,
    not_excluded,
    padded_heads,
    page_lse,
    product,
)
from kvoffload_kernels.transform_code.reference import Levels, code_bytes

_TILE = 64  # tokens scored at a time
_DECODED = 32  # tokens decoded at a time
_TILES = 8  # that one program scores
_PROGRAMS = 1024  # attention is split over tokens into about so many


def supported(query: Tensor, page_size: int) -> bool:
    """Whether the kernels take these: pages of a power of two up to a tile."""
    return page_size & (page_size - 1) == 0 and page_size <= _TILE and query.shape[1] <= MAX_HEADS


@triton.jit  # type: ignore[untyped-decorator]
def _queries(  # type: ignore[no-untyped-def]
    turned, rows, real, FIRST: tl.constexpr, WIDTH: tl.constexpr, KP: tl.constexpr, DIM: tl.constexpr, HP: tl.constexpr
):
    """The turned queries' channels FIRST .. FIRST + WIDTH - 1 as halves, fp16 [2 HP, KP]."""
    k = tl.arange(0, KP)
    mask = real[:, None] & (k < WIDTH)[None, :]
    q = tl.load(turned + rows[:, None] * DIM + FIRST + k[None, :], mask=mask, other=0.0)
    return halves(q, (tl.arange(0, 2 * HP) >= HP)[:, None], tl.float16)


@triton.jit  # type: ignore[untyped-decorator]
def _channels(  # type: ignore[no-untyped-def]
    codes, levels, token, counts, BITS: tl.constexpr, WIDTH: tl.constexpr, KP: tl.constexpr, T: tl.constexpr
):
    """One tier's channels of T tokens, fp16 [KP, T]: codes point to the tier's first byte of each token [T]."""
    PER: tl.constexpr = 8 // BITS
    byte, k = tl.arange(0, KP // PER), tl.arange(0, KP)
    mask = (byte < (WIDTH + PER - 1) // PER)[:, None] & counts[None, :]
    packed = tl.load(codes + token[None, :] + byte[:, None], mask=mask, other=0).to(tl.int32)
    shifts = tl.arange(0, PER) * BITS
    code = tl.reshape((packed[:, None, :] >> shifts[None, :, None]) & ((1 << BITS) - 1), [KP, T])
    return tl.load(levels + (k << BITS)[:, None] + code, mask=(k < WIDTH)[:, None] & counts[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _score_pages(  # type: ignore[no-untyped-def]
    turned, offset, codes, fours, twos, ones, missing, newest, out, n_tokens, n_pages, codes_row,
    HEADS: tl.constexpr, HP: tl.constexpr, W4: tl.constexpr, W2: tl.constexpr, W1: tl.constexpr, K4: tl.constexpr,
    K2: tl.constexpr, K1: tl.constexpr, B4: tl.constexpr, B2: tl.constexpr, BYTES: tl.constexpr, T: tl.constexpr,
    SIZE: tl.constexpr, TILES: tl.constexpr, MISSING: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    DIM: tl.constexpr = W4 + W2 + W1
    n, heads = tl.arange(0, 2 * HP), tl.arange(0, HP)
    rows, real = row * HEADS + n % HP, n % HP < HEADS
    if W4 > 0:
        q4 = _queries(turned, rows, real, 0, W4, K4, DIM, HP)
    if W2 > 0:
        q2 = _queries(turned, rows, real, W4, W2, K2, DIM, HP)
    if W1 > 0:
        q1 = _queries(turned, rows, real, W4 + W2, W1, K1, DIM, HP)
    base = tl.load(offset + row * HEADS + heads, mask=heads < HEADS, other=0.0)
    codes += row * codes_row
    first = tl.program_id(0) * (T * TILES)
    for start in range(first, tl.minimum(first + T * TILES, n_tokens), T):
        token = start + tl.arange(0, T)
        counts, place = token < n_tokens, token.to(tl.int64) * BYTES
        z = tl.zeros([2 * HP, T], tl.float32)
        if W4 > 0:
            z += product(q4, _channels(codes, fours + row * (W4 * 16), place, counts, 4, W4, K4, T))
        if W2 > 0:
            z += product(q2, _channels(codes + B4, twos + row * (W2 * 4), place, counts, 2, W2, K2, T))
        if W1 > 0:
            z += product(q1, _channels(codes + B4 + B2, ones + row * (W1 * 2), place, counts, 1, W1, K1, T))
        z = joined(z, HP, T) + base[:, None]
        if MISSING:
            counts = counts & (token >= tl.load(missing + row))
        lse = page_lse(tl.where(counts[None, :], z, -float("inf")), HP, T // SIZE, SIZE)
        pages = start // SIZE + tl.arange(0, T // SIZE)
        if BOUNDED:
            lse = tl.where((pages <= tl.load(newest))[None, :], lse, -float("inf"))
        mask = (heads < HEADS)[:, None] & (pages < n_pages)[None, :]
        tl.store(out + (row * HEADS + heads)[:, None] * n_pages + pages[None, :], lse, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _store(  # type: ignore[no-untyped-def]
    out,
    acc,
    mass,
    places,
    heads,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    KP: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
):
    k = tl.arange(0, KP)
    mask = (heads < HEADS)[:, None] & (k < WIDTH)[None, :]
    mean = joined(acc, HP, KP) / tl.where(mass > 0, mass, 1.0)[:, None]
    tl.store(out + places[:, None] * DIM + FIRST + k[None, :], mean, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_index(  # type: ignore[no-untyped-def]
    turned, offset, codes, fours, twos, ones, missing, excluded, out, lse_out, n_tokens, n_pages, tiles, codes_row,
    HEADS: tl.constexpr, HP: tl.constexpr, QUERIES: tl.constexpr, W4: tl.constexpr, W2: tl.constexpr,
    W1: tl.constexpr, K4: tl.constexpr, K2: tl.constexpr, K1: tl.constexpr, B4: tl.constexpr, B2: tl.constexpr,
    BYTES: tl.constexpr, T: tl.constexpr, SIZE: tl.constexpr, CAP: tl.constexpr, MISSING: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(1).to(tl.int64), tl.program_id(0)
    DIM: tl.constexpr = W4 + W2 + W1
    n = tl.arange(0, 2 * HP)
    rows, real, second = row * HEADS + n % HP, n % HP < HEADS, (n >= HP)[:, None]
    if W4 > 0:
        q4, acc4 = _queries(turned, rows, real, 0, W4, K4, DIM, HP), tl.zeros([2 * HP, K4], tl.float32)
    if W2 > 0:
        q2, acc2 = _queries(turned, rows, real, W4, W2, K2, DIM, HP), tl.zeros([2 * HP, K2], tl.float32)
    if W1 > 0:
        q1, acc1 = _queries(turned, rows, real, W4 + W2, W1, K1, DIM, HP), tl.zeros([2 * HP, K1], tl.float32)
    base = tl.load(offset + rows, mask=real, other=0.0)
    codes += row * codes_row
    top = tl.full([2 * HP], -float("inf"), tl.float32)
    mass = tl.zeros([2 * HP], tl.float32)
    for start in range(split * tiles * T, tl.minimum((split + 1) * tiles * T, n_tokens), T):
        token = start + tl.arange(0, T)
        counts, place = token < n_tokens, token.to(tl.int64) * BYTES
        z = tl.zeros([2 * HP, T], tl.float32)
        if W4 > 0:
            v4 = _channels(codes, fours + row * (W4 * 16), place, counts, 4, W4, K4, T)
            z += product(q4, v4)
        if W2 > 0:
            v2 = _channels(codes + B4, twos + row * (W2 * 4), place, counts, 2, W2, K2, T)
            z += product(q2, v2)
        if W1 > 0:
            v1 = _channels(codes + B4 + B2, ones + row * (W1 * 2), place, counts, 1, W1, K1, T)
            z += product(q1, v1)
        z = capped(joined_twice(z, HP, T) + base[:, None], CAP)
        if MISSING:
            z = tl.where((token >= tl.load(missing + row))[None, :], z, -float("inf"))
        z = not_excluded(z, excluded, row, n % HP, token // SIZE, n_pages, QUERIES, HEADS)
        new_top = tl.maximum(top, tl.max(z, 1))
        shift = finite(new_top)
        kept, p = tl.exp(top - shift), tl.exp(z - shift[:, None])
        mass, top = mass * kept + tl.sum(p, 1), new_top
        p = halves(p, second, tl.float16)
        if W4 > 0:
            acc4 = acc4 * kept[:, None] + product(p, tl.trans(v4))
        if W2 > 0:
            acc2 = acc2 * kept[:, None] + product(p, tl.trans(v2))
        if W1 > 0:
            acc1 = acc1 * kept[:, None] + product(p, tl.trans(v1))
    heads, mass = tl.arange(0, HP), tl.max(tl.reshape(mass, [2, HP]), 0)
    places = (row * tl.num_programs(0) + split) * HEADS + heads
    if W4 > 0:
        _store(out, acc4, mass, places, heads, 0, W4, K4, DIM, HEADS, HP)
    if W2 > 0:
        _store(out, acc2, mass, places, heads, W4, W2, K2, DIM, HEADS, HP)
    if W1 > 0:
        _store(out, acc1, mass, places, heads, W4 + W2, W1, K1, DIM, HEADS, HP)
    lse = log_of(mass) + finite(tl.max(tl.reshape(top, [2, HP]), 0))
    tl.store(lse_out + places, lse, mask=heads < HEADS)


@triton.jit  # type: ignore[untyped-decorator]
def _decode_tier(  # type: ignore[no-untyped-def]
    codes, levels, out, places, counts,
    BITS: tl.constexpr, WIDTH: tl.constexpr, KP: tl.constexpr, BYTES: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """One tier's channels of tokens at ``places`` [T] of a row; codes and out point to the tier's first."""
    PER: tl.constexpr = 8 // BITS
    k = tl.arange(0, KP)
    mask = counts[:, None] & (k < WIDTH)[None, :]
    packed = tl.load(codes + places[:, None] * BYTES + (k // PER)[None, :], mask=mask, other=0).to(tl.int32)
    code = (packed >> ((k % PER) * BITS)[None, :]) & ((1 << BITS) - 1)
    channels = tl.load(levels + (k << BITS)[None, :] + code, mask=mask, other=0.0)
    tl.store(out + places[:, None] * DIM + k[None, :], channels.to(tl.float32), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    codes, fours, twos, ones, out, n_tokens, codes_row,
    W4: tl.constexpr, W2: tl.constexpr, W1: tl.constexpr, K4: tl.constexpr, K2: tl.constexpr, K1: tl.constexpr,
    B4: tl.constexpr, B2: tl.constexpr, BYTES: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    DIM: tl.constexpr = W4 + W2 + W1
    places = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    counts = places < n_tokens
    codes += row * codes_row
    out += row * n_tokens * DIM
    if W4 > 0:
        _decode_tier(codes, fours + row * (W4 * 16), out, places, counts, 4, W4, K4, BYTES, DIM)
    if W2 > 0:
        _decode_tier(codes + B4, twos + row * (W2 * 4), out + W4, places, counts, 2, W2, K2, BYTES, DIM)
    if W1 > 0:
        _decode_tier(codes + B4 + B2, ones + row * (W1 * 2), out + W4 + W2, places, counts, 1, W1, K1, BYTES, DIM)


def decode(codes: Tensor, levels: Levels) -> Tensor:
    """As ``reference.decode``; rows of codes may lie apart."""
    rows, n_tokens, _ = codes.shape
    sizes = _tiers(levels)
    out = torch.empty(rows, n_tokens, sum(level.shape[1] for level in levels), device=codes.device)
    if out.numel() > 0:
        grid = (triton.cdiv(n_tokens, _DECODED), rows)
        _decode[grid](codes, *levels, out, n_tokens, codes.stride(0), T=_DECODED, **sizes)
    return out


def score_pages(
    query: Tensor,
    codes: Tensor,
    mean: Tensor,
    synthesis: Tensor,
    levels: Levels,
    *,
    page_size: int,
    missing: Tensor | None = None,
    newest: Tensor | None = None,
) -> Tensor:
    """As ``reference.score_pages`` where ``supported``; rows of codes may lie apart."""
    rows, heads, _ = query.shape
    n_tokens = codes.shape[1]
    out = query.new_empty(rows, heads, n_tokens // page_size)
    if n_tokens > 0:
        _score_pages[(triton.cdiv(n_tokens, _TILE * _TILES), rows)](
            *_arguments(query, codes, mean, synthesis, levels, missing), query if newest is None else newest, out,
            n_tokens, out.shape[2], codes.stride(0), TILES=_TILES, BOUNDED=newest is not None,
            **_sizes(query, levels, page_size, missing),
        )  # fmt: skip
    return out


def attend_index(
    query: Tensor,
    codes: Tensor,
    mean: Tensor,
    synthesis: Tensor,
    levels: Levels,
    *,
    excluded: Tensor,
    page_size: int,
    missing: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.attend_index`` where ``supported``."""
    rows, heads, _ = query.shape
    n_tokens, n_channels = codes.shape[1], synthesis.shape[2]
    n_tiles = triton.cdiv(n_tokens, _TILE)
    tiles = max(1, triton.cdiv(n_tiles * rows, _PROGRAMS))
    n_splits = max(1, triton.cdiv(n_tiles, tiles))
    out, lse = query.new_empty(rows, n_splits, heads, n_channels), query.new_empty(rows, n_splits, heads)
    _attend_index[(n_splits, rows)](
        *_arguments(query, codes, mean, synthesis, levels, missing), excluded.contiguous().view(torch.uint8), out, lse,
        n_tokens, excluded.shape[1], tiles, codes.stride(0), QUERIES=excluded.shape[0] // rows, CAP=softcap or 0.0,
        **_sizes(query, levels, page_size, missing),
    )  # fmt: skip
    channels, lse = merge_splits(out, lse)
    keys = channels @ synthesis.float().mT + mean.float()[:, None]
    return keys.masked_fill(lse.isneginf()[..., None], 0.0), lse


def _arguments(
    query: Tensor, codes: Tensor, mean: Tensor, synthesis: Tensor, levels: Levels, missing: Tensor | None
) -> tuple[Tensor, ...]:
    turned, offset = query @ synthesis.float(), query @ mean.float()[..., None]
    return turned, offset, codes, *levels, turned if missing is None else missing


def _sizes(query: Tensor, levels: Levels, page_size: int, missing: Tensor | None) -> dict[str, int | bool]:
    heads = {"HEADS": query.shape[1], "HP": padded_heads(query.shape[1])}
    return heads | _tiers(levels) | {"T": _TILE, "SIZE": page_size, "MISSING": missing is not None}


def _tiers(levels: Levels) -> dict[str, int]:
    """Channels of each tier, those of a tile, and where the bytes of each begin."""
    w4, w2, w1 = (level.shape[1] for level in levels)
    return {
        "W4": w4,
        "W2": w2,
        "W1": w1,
        "K4": max(16, triton.next_power_of_2(w4)),
        "K2": max(16, triton.next_power_of_2(w2)),
        "K1": max(16, triton.next_power_of_2(w1)),
        "B4": code_bytes((w4, 0, 0)),
        "B2": code_bytes((0, w2, 0)),
        "BYTES": code_bytes((w4, w2, w1)),
    }
