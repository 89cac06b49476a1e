"""Scoring of pages straight from packed keys by single warps that keep everything in registers.

A lane loads the words of codes that its tensor core operand is made of, so nothing moves between lanes but a page's
maximum and sum. Two codes at the same place of two words are a pair of subnormal bf16 as soon as the others are
masked off: a pattern p below 2^8 is p 2^-133. The query takes the place back, and 2^64 keeps products normal.
"""

from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor, int16

from kvoffload_kernels.explicit import MMA, gl, jit, linear, multiply, powers
from kvoffload_kernels.tiles import INTERPRETED

_PROGRAMS = 2048  # about so many warps are resident at a time
_MOST_GROUPS = 16  # that a program scores, rows of one tile of zeros
_SHIFT = 8  # codes above the lower byte of a word come down
_UP, _DOWN, _LOG2E, _LN2 = 64, 2.0**69, 1.4426950408889634, 0.6931471805599453


@cache
def _layouts(
    bits: int, words: int, word_bits: int, tokens: int, channels: int, heads: int, size: int
) -> dict[str, Any]:
    """Of pairs of words [T, S, W / 2] and of words as loaded [T, W], of steps [8 / bits, W, bytes a word] and as
    loaded, of the zeros of 16 groups [16, 4, C / 4] and of scores [pages, heads].

    In an operand of width KW lanes 0 and 1 stand for words KW and 2 KW, the rest of the words, shifts and planes of
    codes are registers.
    """
    width = 4 if words >= 16 else 2
    columns = powers(words)
    j = columns.index(width)
    near, lane = columns[:j] + columns[j + 2 :], columns[j : j + 2]
    rows = powers(tokens)
    n_bytes, planes, shifts = word_bits // 8, 8 // bits, word_bits // bits
    codes = [  # of pairs of words
        [[0, 0, x // 2] for x in near[1:]] + [[x, 0, 0] for x in rows[3:]] + [[0, x, 0] for x in powers(shifts)],
        [[0, 0, x // 2] for x in lane] + [[x, 0, 0] for x in rows[:3]],
    ]
    steps = [
        [[0, 0, x] for x in powers(n_bytes)] + [[0, x, 0] for x in near] + [[x, 0, 0] for x in powers(planes)],
        [[0, x, 0] for x in lane] + 3 * [[0, 0, 0]],
    ]
    flat = [[[plane * words * n_bytes + word * n_bytes + byte] for plane, word, byte in bases] for bases in steps]
    loaded = [
        [[0, x] for x in near] + [[x, 0] for x in rows[3:]],
        [[0, x] for x in lane] + [[x, 0] for x in rows[:3]],
    ]
    quarter = [[0, 0, x] for x in powers(channels // 4)]
    eight = [[x, 0, 0] for x in (1, 2, 4)]
    pages = [x // size for x in rows]
    return {
        "MMA": MMA,
        "KW": width,
        "CODES": linear(codes[0], codes[1], [tokens, shifts, words // 2]),
        "CODES_IN": linear(loaded[0], loaded[1], [tokens, words]),
        "STEPS": linear(steps[0], steps[1], [planes, words, n_bytes]),
        "STEPS_IN": linear(flat[0], flat[1], [planes * words * n_bytes]),
        "ZEROS": linear([*quarter, [8, 0, 0]], [[0, 1, 0], [0, 2, 0], *eight], [16, 4, channels // 4]),
        "SCORES": linear(
            [[0, x] for x in powers(heads)[2:]] + [[x, 0] for x in pages[3:] if x],
            [[0, 1], [0, 2]] + [[x, 0] for x in pages[:3]], [tokens // size, heads],
        ),
    }  # fmt: skip


@jit  # type: ignore[untyped-decorator]
def _along(n: tl.constexpr, AXIS: tl.constexpr, AT: tl.constexpr):  # type: ignore[no-untyped-def]
    """0 .. n - 1 along one of three axes."""
    FIRST: tl.constexpr = 1 if AXIS == 0 else 0  # of the other two axes
    SECOND: tl.constexpr = 1 if AXIS == 2 else 2
    at = gl.arange(0, n, layout=gl.SliceLayout(FIRST, gl.SliceLayout(SECOND, AT)))
    return gl.expand_dims(gl.expand_dims(at, FIRST), SECOND)


@jit
def _halves(x, second):  # type: ignore[no-untyped-def]
    """x fp32 cut off to bf16 where ``second`` is 0, what that leaves of it, rounded, where it is 1."""
    high = ((x.to(gl.int32, bitcast=True) & -65536) ^ (second << 31)).to(gl.float32, bitcast=True)
    return gl.fma(x, second.to(gl.float32), high).to(gl.bfloat16)


@jit  # type: ignore[untyped-decorator]
def _bases(  # type: ignore[no-untyped-def]
    query, zero, first, last, heads_left,
    DIM: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, ZEROS: tl.constexpr, MMA: tl.constexpr,
):  # fmt: skip
    """query . zero of groups ``first`` .. ``last`` - 1 as halves, fp32 [16, N]; zeros are exact in TF32."""
    A: tl.constexpr = gl.DotOperandLayout(0, MMA, 1)
    B: tl.constexpr = gl.DotOperandLayout(1, MMA, 1)
    groups = first + _along(16, 0, ZEROS)
    channels = _along(4, 1, ZEROS) * (DP // 4) + _along(DP // 4, 2, ZEROS)
    mask = (groups < last) & (channels < DIM)
    zeros = gl.load(zero + groups.to(gl.int64) * DIM + channels, mask=mask, other=0.0)
    zeros = gl.convert_layout(gl.reshape(gl.permute(zeros, (0, 2, 1)), [16, DP]), A)
    k, n = gl.arange(0, DP, layout=gl.SliceLayout(1, B)), gl.arange(0, N, layout=gl.SliceLayout(0, B))
    channel = (k % 4 * (DP // 4) + k // 4)[:, None]
    mask = ((n // 2) < heads_left)[None, :] & (channel < DIM)
    q = gl.load(query + (n // 2)[None, :] * DIM + channel, mask=mask, other=0.0)
    high = (q.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
    q = gl.where((n % 2 == 1)[None, :], q - high, high)
    return multiply(zeros.to(gl.float32), q, gl.zeros([16, N], gl.float32, MMA), input_precision="tf32")


@jit  # type: ignore[untyped-decorator]
def _pairs(words, T: tl.constexpr, WP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two words in one int32, the lower one first: [T, WP] to [T, WP / 2]."""
    low, high = gl.split(gl.reshape(words.to(gl.int16), [T, WP // 2, 2]))
    if INTERPRETED:
        return (low.to(gl.int32) & 0xFFFF) | (high.to(gl.int32) << 16)
    else:
        return gl.inline_asm_elementwise(
            "mov.b32 $0, {$1, $2};", "=r,h,h", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )


@jit  # type: ignore[untyped-decorator]
def _values(  # type: ignore[no-untyped-def]
    pairs,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    CODES: tl.constexpr,
):
    """All codes of pairs of words [T, WP / 2] as bf16 with the bits of their words' lower byte, [T, S * WP = K]."""
    place = _along(S, 1, CODES) * BITS
    mask = (((1 << BITS) - 1) << (place % SHIFT)) * 0x00010001
    # what comes down from the higher word into the lower one is masked off
    values = (gl.expand_dims(pairs, 1) >> (place // SHIFT * SHIFT)) & mask
    if INTERPRETED:  # it takes no subnormal bf16
        low, high = (values << 16).to(gl.float32, bitcast=True), (values & -65536).to(gl.float32, bitcast=True)
    else:
        low, high = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [values], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
        )
    return gl.reshape(gl.join(low, high), [T, K])


@jit
def _power(x):  # type: ignore[no-untyped-def]
    """2^x."""
    if INTERPRETED:
        return gl.exp2(x)
    else:
        return gl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
        )


@jit
def _log(x):  # type: ignore[no-untyped-def]
    """The logarithm to base 2, of 0 -inf."""
    if INTERPRETED:
        return gl.where(x > 0, gl.log2(gl.where(x > 0, x, 1.0)), -float("inf"))
    else:
        return gl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
        )


@jit  # type: ignore[untyped-decorator]
def _score_pages(  # type: ignore[no-untyped-def]
    query, codes, zero, step, missing, newest, out, n_groups, n_pages, groups, codes_row, stats_row,
    HEADS: tl.constexpr, HP: tl.constexpr, DIM: tl.constexpr, DP: tl.constexpr, WORDS: tl.constexpr, WP: tl.constexpr,
    WORD: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr, SIZE: tl.constexpr, MISSING: tl.constexpr,
    BOUNDED: tl.constexpr,
    SHIFT: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, LOG2E: tl.constexpr, LN2: tl.constexpr,
    MMA: tl.constexpr, KW: tl.constexpr, CODES: tl.constexpr, CODES_IN: tl.constexpr, STEPS: tl.constexpr,
    STEPS_IN: tl.constexpr, ZEROS: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    A: tl.constexpr = gl.DotOperandLayout(0, MMA, KW)
    B: tl.constexpr = gl.DotOperandLayout(1, MMA, KW)
    S: tl.constexpr = WORD // BITS
    PLANES: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = WORD // 8
    WIDTH: tl.constexpr = WORDS * BYTES
    K: tl.constexpr = S * WP
    N: tl.constexpr = 2 * HP
    PAGES: tl.constexpr = T // SIZE
    row = gl.program_id(1).to(gl.int64)
    first = gl.program_id(0) * groups
    last = gl.minimum(first + groups, n_groups)
    first_head = gl.program_id(2) * HP
    heads_left = HEADS - first_head
    codes += row * codes_row
    step += row * stats_row
    query += (row * HEADS + first_head) * DIM
    out += (row * HEADS + first_head) * n_pages

    t, j = gl.arange(0, T, layout=gl.SliceLayout(1, CODES_IN)), gl.arange(0, WP, layout=gl.SliceLayout(0, CODES_IN))
    code_at, code_is = t[:, None] * WORDS + j[None, :], (t >= 0)[:, None] & (j < WORDS)[None, :]
    if WP == WORDS:
        step_at = gl.arange(0, DIM, layout=STEPS_IN)
        step_is = step_at >= 0
    else:
        word = _along(WP, 1, STEPS)
        step_at = _along(PLANES, 0, STEPS) * WIDTH + word * BYTES + _along(BYTES, 2, STEPS)
        step_is = (step_at >= 0) & (word < WORDS)
    next_pairs = _pairs(gl.load(codes + first.to(gl.int64) * (T * WORDS) + code_at, mask=code_is, other=0), T, WP)
    next_steps = gl.load(step + first.to(gl.int64) * DIM + step_at, mask=step_is, other=0.0)

    bases = _bases(query, zero + row * stats_row, first, last, heads_left, DIM, DP, N, ZEROS, MMA) * LOG2E
    k, n = gl.arange(0, K, layout=gl.SliceLayout(1, B)), gl.arange(0, N, layout=gl.SliceLayout(0, B))
    place = k // WP * BITS
    channel = place % 8 // BITS * WIDTH + k % WP * BYTES + place // 8
    mask = ((n // 2) < heads_left)[None, :] & (k % WP < WORDS)[:, None]
    q = gl.load(query + (n // 2)[None, :] * DIM + channel[:, None], mask=mask, other=0.0)
    q = q * ((127 + UP - place % SHIFT) << 23).to(gl.float32, bitcast=True)[:, None]
    base_of = gl.arange(0, 16, layout=gl.SliceLayout(1, MMA))
    tokens = gl.arange(0, T, layout=gl.SliceLayout(1, MMA))
    heads, pages = (
        gl.arange(0, HP, layout=gl.SliceLayout(0, SCORES)),
        gl.arange(0, PAGES, layout=gl.SliceLayout(1, SCORES)),
    )
    for g in range(first, last):
        pairs, steps = next_pairs, next_steps
        following = gl.minimum(g + 1, last - 1).to(gl.int64)
        next_pairs = _pairs(gl.load(codes + following * (T * WORDS) + code_at, mask=code_is, other=0), T, WP)
        next_steps = gl.load(step + following * DIM + step_at, mask=step_is, other=0.0)
        steps = gl.reshape(gl.permute(gl.reshape(steps, [PLANES, WP, BYTES]), (2, 0, 1)), [K])
        steps = gl.convert_layout(steps, gl.SliceLayout(1, B)).to(gl.float32)
        stepped = _halves(q * steps[:, None], (n % 2)[None, :])
        pairs = gl.convert_layout(pairs, gl.SliceLayout(1, CODES))
        values = _values(pairs, BITS, SHIFT, S, K, T, CODES)
        z = multiply(gl.convert_layout(values, A), stepped, gl.zeros([T, N], gl.float32, MMA))
        z = z * (DOWN * LOG2E) + gl.sum(gl.where((base_of == g - first)[:, None], bases, 0.0), 0)[None, :]
        if MISSING:
            z = gl.where((g * T + tokens >= gl.load(missing + row))[:, None], z, -float("inf"))
        z = gl.reshape(gl.sum(gl.reshape(z, [T, HP, 2]), 2), [PAGES, SIZE, HP])
        top = gl.max(z, 1)
        if MISSING:
            top = gl.where(top == -float("inf"), 0.0, top)
        lse = (_log(gl.sum(_power(z - gl.expand_dims(top, 1)), 1)) + top) * LN2
        page = g * PAGES + pages
        real = (heads < heads_left)[None, :] & (page < n_pages)[:, None]
        lse = gl.convert_layout(lse, SCORES)
        if BOUNDED:
            lse = gl.where((page <= gl.load(newest))[:, None], lse, -float("inf"))
        gl.store(out + heads[None, :] * n_pages + page[:, None], lse, mask=real)


def score_pages(
    query: Tensor,
    codes: Tensor,
    zero: Tensor,
    step: Tensor,
    bits: int,
    *,
    n_tokens: int,
    page_size: int,
    missing: Tensor | None = None,
    newest: Tensor | None = None,
) -> Tensor:
    """As ``reference.score_pages`` where ``kernel.supported``; rows of codes, zero and step may lie apart."""
    rows, heads, dim = query.shape
    group, width = codes.shape[2:]
    n_pages, n_groups = n_tokens // page_size, -(-n_tokens // group)
    out = query.new_empty(rows, heads, n_pages)
    if n_pages == 0:
        return out
    word = 8 if width % 2 else 16
    codes = codes if word == 8 else codes.view(int16)
    padded = max(8, triton.next_power_of_2(codes.shape[3]))
    channels = max(16, triton.next_power_of_2(dim))
    together = 4 if heads <= 4 or dim > 128 else 8
    groups = min(_MOST_GROUPS, max(1, n_groups * rows // _PROGRAMS))
    _score_pages[(triton.cdiv(n_groups, groups), rows, triton.cdiv(heads, together))](
        query.contiguous(), codes, zero, step, query if missing is None else missing,
        query if newest is None else newest, out, n_groups, n_pages, groups, codes.stride(0), zero.stride(0),
        HEADS=heads, HP=together, DIM=dim, DP=channels, WORDS=codes.shape[3], WP=padded, WORD=word, BITS=bits, T=group,
        SIZE=page_size, MISSING=missing is not None, BOUNDED=newest is not None, SHIFT=_SHIFT, UP=_UP, DOWN=_DOWN,
        LOG2E=_LOG2E, LN2=_LN2,
        num_warps=1, **_layouts(bits, padded, word, group, channels, together, page_size),
    )  # fmt: skip
    return out
