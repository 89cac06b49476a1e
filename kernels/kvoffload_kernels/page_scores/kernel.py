"""Scoring of pages and attention straight from packed keys, in Triton: each group of codes is decoded once for all
query heads of a row, and no token's logit is written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload_kernels.merge.kernel import merge_splits
from kvoffload_kernels.tiles import (
    INTERPRETED,
    MAX_HEADS,
    capped,
    finite,
    halves,
    joined,
    joined_twice,
    log_of,
    not_excluded,
    padded_heads,
    product,
)

try:
    from kvoffload_kernels.page_scores.scores import score_pages
except ImportError:  # Gluon has no product for single warps before triton 3.6
    from kvoffload_kernels.page_scores.reference import score_pages

__all__ = ["attend_index", "score_pages", "supported"]

_PROGRAMS = 1024  # attention is split over tokens into about so many


def supported(query: Tensor, codes: Tensor, page_size: int) -> bool:
    """Whether the kernels take these: groups and pages of powers of two, a group at least 16 tokens and a page."""
    group = codes.shape[2]
    powers = all(n & (n - 1) == 0 for n in (group, page_size))
    return powers and 16 <= group <= 128 and page_size <= group and query.shape[1] <= MAX_HEADS


@triton.jit  # type: ignore[untyped-decorator]
def _codes(  # type: ignore[no-untyped-def]
    codes, BITS: tl.constexpr, WIDTH: tl.constexpr, WP: tl.constexpr, T: tl.constexpr
):
    """128 plus the codes of one group, bf16 [8 / BITS * WP, T]: plane after plane, each padded from WIDTH to WP
    channels. 128 to 143 are bit patterns of bf16 that end in the code."""
    byte, token = tl.arange(0, WP), tl.arange(0, T)
    mask = (byte < WIDTH)[:, None] & (token >= 0)[None, :]
    packed = tl.load(codes + token[None, :] * WIDTH + byte[:, None], mask=mask, other=0).to(tl.int32)
    shifts = tl.arange(0, 8 // BITS) * BITS
    planes = tl.reshape((packed[None, :, :] >> shifts[:, None, None]) & ((1 << BITS) - 1), [8 // BITS * WP, T])
    if INTERPRETED:
        return (planes + 128).to(tl.float32).to(tl.bfloat16)
    return (planes | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)  # two bit operations instead of two conversions


@triton.jit  # type: ignore[untyped-decorator]
def _attend_index(  # type: ignore[no-untyped-def]
    query, codes, zero, step, missing, excluded, out, lse_out, n_groups, n_pages, groups, codes_row, stats_row,
    HEADS: tl.constexpr, HP: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    WP: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, SIZE: tl.constexpr, CAP: tl.constexpr,
    MISSING: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(1).to(tl.int64), tl.program_id(0)
    K: tl.constexpr = 8 // BITS * WP
    k, n, token = tl.arange(0, K), tl.arange(0, 2 * HP), tl.arange(0, T)
    channel, real = k // WP * WIDTH + k % WP, k % WP < WIDTH
    head, second = n % HP, n >= HP
    mask = (head < HEADS)[:, None] & real[None, :]
    q = tl.load(query + (row * HEADS + head)[:, None] * DIM + channel[None, :], mask=mask, other=0.0)
    top = tl.full([2 * HP], -float("inf"), tl.float32)
    mass = tl.zeros([2 * HP], tl.float32)
    acc = tl.zeros([2 * HP, K], tl.float32)
    for g in range(split * groups, tl.minimum((split + 1) * groups, n_groups)):
        group = tl.full([], 0, tl.int64) + g
        stats = row * stats_row + group * DIM + channel
        zeros = tl.load(zero + stats, mask=real, other=0.0).to(tl.float32)
        steps = tl.load(step + stats, mask=real, other=0.0).to(tl.float32)
        values = _codes(codes + row * codes_row + group * T * WIDTH, BITS, WIDTH, WP, T)
        stepped = halves(q * steps[None, :], second[:, None], tl.bfloat16)
        z = product(stepped, values) - 128 * tl.sum(stepped.to(tl.float32), 1)[:, None]
        z = capped(joined_twice(z, HP, T) + tl.sum(q * zeros[None, :], 1)[:, None], CAP)
        tokens = g * T + token
        if MISSING:
            z = tl.where((tokens >= tl.load(missing + row))[None, :], z, -float("inf"))
        z = not_excluded(z, excluded, row, head, tokens // SIZE, n_pages, QUERIES, HEADS)
        new_top = tl.maximum(top, tl.max(z, 1))
        shift = finite(new_top)
        kept, p = tl.exp(top - shift), tl.exp(z - shift[:, None])
        weight = tl.sum(p, 1)
        mass, top = mass * kept + weight, new_top
        p = halves(p, second[:, None], tl.bfloat16)
        codes_mean = product(p, tl.trans(values)) - 128 * tl.sum(p.to(tl.float32), 1)[:, None]
        acc = (
            acc * kept[:, None] + codes_mean * steps[None, :] + tl.where(second, 0.0, weight)[:, None] * zeros[None, :]
        )
    acc, mass = joined(acc, HP, K), tl.max(tl.reshape(mass, [2, HP]), 0)
    lse = log_of(mass) + finite(tl.max(tl.reshape(top, [2, HP]), 0))
    heads = tl.arange(0, HP)
    place = (row * tl.num_programs(0) + split) * HEADS + heads
    mask = (heads < HEADS)[:, None] & real[None, :]
    tl.store(out + place[:, None] * DIM + channel[None, :], acc / tl.where(mass > 0, mass, 1.0)[:, None], mask=mask)
    tl.store(lse_out + place, lse, mask=heads < HEADS)


def attend_index(
    query: Tensor,
    codes: Tensor,
    zero: Tensor,
    step: Tensor,
    bits: int,
    *,
    excluded: Tensor,
    page_size: int,
    missing: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.attend_index`` where ``supported``."""
    rows, heads, dim = query.shape
    n_pages = excluded.shape[1]
    n_groups = -(-n_pages * page_size // codes.shape[2])
    groups = max(1, triton.cdiv(n_groups * rows, _PROGRAMS))
    n_splits = max(1, triton.cdiv(n_groups, groups))
    out, lse = query.new_empty(rows, n_splits, heads, dim), query.new_empty(rows, n_splits, heads)
    arguments = _arguments(query, codes, zero, step, missing)
    _attend_index[(n_splits, rows)](
        *arguments, excluded.contiguous().view(torch.uint8), out, lse, n_groups, n_pages, groups, codes.stride(0),
        zero.stride(0), QUERIES=excluded.shape[0] // rows, CAP=softcap or 0.0,
        num_warps=2, **_sizes(query, codes, bits, page_size, missing),
    )  # fmt: skip
    return merge_splits(out, lse)


def _arguments(query: Tensor, codes: Tensor, zero: Tensor, step: Tensor, missing: Tensor | None) -> tuple[Tensor, ...]:
    return query.contiguous(), codes, zero, step, query if missing is None else missing


def _sizes(query: Tensor, codes: Tensor, bits: int, page_size: int, missing: Tensor | None) -> dict[str, int | bool]:
    heads, dim = query.shape[1:]
    width = dim * bits // 8
    return {
        "HEADS": heads,
        "HP": padded_heads(heads),
        "DIM": dim,
        "WIDTH": width,
        "WP": max(triton.next_power_of_2(width), 2 * bits),
        "BITS": bits,
        "T": codes.shape[2],
        "SIZE": page_size,
        "MISSING": missing is not None,
    }
