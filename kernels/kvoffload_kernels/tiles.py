"""Pieces that the Triton kernels share: products in low precision that lose nothing, the log-sum-exp of pages, and a
running softmax.

A factor that is not exact in 16 bits goes in as two halves, what it rounds to and what that loses, as rows of one
tile: H heads are 2 HP rows, row n holds half n // HP of head n % HP. Tensor cores want 16 rows, so this costs nothing
for up to 8 heads. The other factor (codes, levels, stored keys) is exact in its type.
"""

import triton
import triton.language as tl

MAX_HEADS = 64
"""Query heads (times queries) that a tile takes."""

# numpy has no bfloat16: triton's interpreter would multiply the bit patterns
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def padded_heads(n_heads: int) -> int:
    """HP, so that 2 HP >= 16."""
    return max(8, int(triton.next_power_of_2(n_heads)))


@triton.jit  # type: ignore[untyped-decorator]
def halves(x, second, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """x fp32 rounded to DTYPE, or where ``second`` what that lost."""
    high = x.to(DTYPE)
    low = (x - high.to(tl.float32)).to(DTYPE)
    return tl.where(second, low, high)


@triton.jit
def product(a, b):  # type: ignore[no-untyped-def]
    """a @ b, fp32; what is fp32 is not rounded."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32)) if INTERPRETED else tl.dot(a, b, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def joined(z, HP: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of both halves of [2 HP, WIDTH]: [HP, WIDTH]."""
    return tl.sum(tl.reshape(z, [2, HP, WIDTH]), 0)


@triton.jit  # type: ignore[untyped-decorator]
def joined_twice(z, HP: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of both halves, in the rows of both: [2 HP, WIDTH]."""
    both = tl.expand_dims(joined(z, HP, WIDTH), 0)
    return tl.reshape(tl.broadcast_to(both, [2, HP, WIDTH]), [2 * HP, WIDTH])


@triton.jit  # type: ignore[untyped-decorator]
def capped(z, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """CAP tanh(z / CAP); z itself if CAP is 0."""
    if CAP > 0:
        z = CAP * (2 * tl.sigmoid(z * (2 / CAP)) - 1)
    return z


@triton.jit
def finite(top):  # type: ignore[no-untyped-def]
    """A shift that exponents can be taken against: 0 where nothing is there."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def log_of(total):  # type: ignore[no-untyped-def]
    """The logarithm, -inf at zero."""
    return tl.where(total > 0, tl.log(tl.where(total > 0, total, 1.0)), -float("inf"))


@triton.jit  # type: ignore[untyped-decorator]
def page_lse(z, HP: tl.constexpr, PAGES: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Log-sum-exp of each page's logits: [HP, PAGES * SIZE] to [HP, PAGES]."""
    pages = tl.reshape(z, [HP, PAGES, SIZE])
    shift = finite(tl.max(pages, 2))
    return log_of(tl.sum(tl.exp(pages - shift[:, :, None]), 2)) + shift


@triton.jit  # type: ignore[untyped-decorator]
def not_excluded(  # type: ignore[no-untyped-def]
    z, excluded, row, heads, pages, n_pages, QUERIES: tl.constexpr, HEADS: tl.constexpr
):
    """Logits [n, T] of row ``row``, -inf where the page is excluded for the query of the head or is none: heads [n],
    pages [T], excluded uint8 [rows * QUERIES, n_pages]."""
    query_row = row * QUERIES + heads // (HEADS // QUERIES)
    real = (heads < HEADS)[:, None] & (pages < n_pages)[None, :]
    out = tl.load(excluded + query_row[:, None] * n_pages + pages[None, :], mask=real, other=1)
    return tl.where(out == 0, z, -float("inf"))


@triton.jit  # type: ignore[untyped-decorator]
def weighed(z, v, top, mass, acc, second, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A running softmax after one more tile: logits [2 HP, T] and values [T, DVP]."""
    new_top = tl.maximum(top, tl.max(z, 1))
    shift = finite(new_top)
    kept, p = tl.exp(top - shift), tl.exp(z - shift[:, None])
    acc = acc * kept[:, None] + product(halves(p, second, dtype), v)
    return new_top, mass * kept + tl.sum(p, 1), acc


@triton.jit  # type: ignore[untyped-decorator]
def store_partial(  # type: ignore[no-untyped-def]
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
