"""Top-K of pages in four launches of Triton: every head's total mass, every page's share as a key of two digits with
counts of the first digit, counts of the second one where the first does not decide, and the pages themselves.

Every chunk of a list counts for itself and adds up what the others have counted: nothing is zeroed and no order is left
to chance.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvoffload_kernels.page_shares.kernel import head_totals
from kvoffload_kernels.page_shares.kernel import supported as shares_supported
from kvoffload_kernels.page_top.reference import LEAST, STEPS, TOP_KEY
from kvoffload_kernels.tiles import finite, log_of

_DIGIT = tl.constexpr(64)  # values of a digit; a key is two of them
_LEAST, _STEPS, _TOP_KEY = tl.constexpr(LEAST), tl.constexpr(STEPS), tl.constexpr(TOP_KEY)
_BLOCK = 256  # pages at a time
_CHUNKS = 64  # of a list, about


@triton.jit  # type: ignore[untyped-decorator]
def _counted(digits, counts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of the digits [BLOCK] that count have each value, int32 [64]."""
    spare = tl.sum(tl.where(counts, 0, 1), 0)
    found = tl.histogram(tl.where(counts, digits, 0), _DIGIT)
    return found - tl.where(tl.arange(0, _DIGIT) == 0, spare, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _keys(  # type: ignore[no-untyped-def]
    scores, totals, keys, high, n_pages, n_blocks, HEADS: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr
):
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heads = tl.arange(0, HP)
    rows = row * HEADS + heads
    total = tl.load(totals + rows, mask=heads < HEADS, other=0.0)
    count = tl.zeros([_DIGIT], tl.int32)
    for block in range(n_blocks):
        page = (chunk * n_blocks + block) * BLOCK + tl.arange(0, BLOCK)
        real = page < n_pages
        mask = (heads < HEADS)[:, None] & real[None, :]
        z = tl.load(scores + rows[:, None] * n_pages + page[None, :], mask=mask, other=-float("inf")) - total[:, None]
        shift = finite(tl.max(z, 0))
        share = log_of(tl.sum(tl.exp(z - shift[None, :]), 0)) + shift
        step = tl.minimum(tl.maximum((share - _LEAST) * _STEPS, 1.0), _TOP_KEY)
        key = tl.where(share == -float("inf"), 0, step.to(tl.int32))
        tl.store(keys + row * n_pages + page, key.to(tl.int16), mask=real)
        count += _counted(key // _DIGIT, real, BLOCK)
    place = row * tl.num_programs(0) + chunk
    tl.store(high + place * _DIGIT + tl.arange(0, _DIGIT), count)


@triton.jit  # type: ignore[untyped-decorator]
def _tables(counts, row_list, n_chunks, CP: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the chunks of a list have counted, int32 [CP, 64]."""
    c, b = tl.arange(0, CP), tl.arange(0, _DIGIT)
    places = (row_list * n_chunks + c)[:, None] * _DIGIT + b[None, :]
    return tl.load(counts + places, mask=(c < n_chunks)[:, None] & (b >= 0)[None, :], other=0)


@triton.jit
def _threshold(table, wanted):  # type: ignore[no-untyped-def]
    """The largest digit that ``wanted`` are not above or equal to, and how many of them it and those below have."""
    total, b = tl.sum(table, 0), tl.arange(0, _DIGIT)
    reached = tl.cumsum(total, 0, reverse=True) >= wanted
    digit = tl.maximum(tl.sum(reached.to(tl.int32), 0) - 1, 0)
    return digit, wanted - tl.sum(tl.where(b > digit, total, 0), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _wanted(n_wanted, n_slices, COUNTED: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.load(n_wanted).to(tl.int32), n_slices) if COUNTED else n_slices


@triton.jit  # type: ignore[untyped-decorator]
def _low_digits(  # type: ignore[no-untyped-def]
    keys, high, low, n_wanted, n_slices, n_pages, n_blocks,
    N_HEADS: tl.constexpr, CP: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wanted = _wanted(n_wanted, n_slices, COUNTED)
    digit, _ = _threshold(_tables(high, row // N_HEADS, N_HEADS * tl.num_programs(0), CP), wanted)
    count = tl.zeros([_DIGIT], tl.int32)
    for block in range(n_blocks):
        page = (chunk * n_blocks + block) * BLOCK + tl.arange(0, BLOCK)
        key = tl.load(keys + row * n_pages + page, mask=page < n_pages, other=0).to(tl.int32)
        count += _counted(key % _DIGIT, (page < n_pages) & (key // _DIGIT == digit), BLOCK)
    place = row * tl.num_programs(0) + chunk
    tl.store(low + place * _DIGIT + tl.arange(0, _DIGIT), count)


@triton.jit  # type: ignore[untyped-decorator]
def _take(  # type: ignore[no-untyped-def]
    keys, high, low, n_wanted, row_ids, page_ids, wanted_out, n_slices, n_pages, n_blocks,
    N_HEADS: tl.constexpr, CP: tl.constexpr, COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_list, n_chunks = row // N_HEADS, N_HEADS * tl.num_programs(0)
    mine = (row % N_HEADS).to(tl.int32) * tl.num_programs(0) + chunk
    c, b = tl.arange(0, CP), tl.arange(0, _DIGIT)
    wanted = _wanted(n_wanted, n_slices, COUNTED)
    first, second = _tables(high, row_list, n_chunks, CP), _tables(low, row_list, n_chunks, CP)
    digit, rest = _threshold(first, wanted)
    last, ties = _threshold(second, rest)
    above = tl.sum(tl.where((b > digit)[None, :], first, 0) + tl.where((b > last)[None, :], second, 0), 1)
    equal = tl.sum(tl.where((b == last)[None, :], second, 0), 1)
    n_equal = tl.sum(tl.where(c < mine, equal, 0), 0)
    n_before = tl.sum(tl.where(c < mine, above, 0), 0) + tl.minimum(n_equal, ties)
    threshold, base = digit * _DIGIT + last, row_list * n_slices
    for block in range(n_blocks):
        page = (chunk * n_blocks + block) * BLOCK + tl.arange(0, BLOCK)
        real = page < n_pages
        key = tl.load(keys + row * n_pages + page, mask=real, other=-1).to(tl.int32)
        tie = (key == threshold).to(tl.int32)
        taken = (key > threshold) | ((tie == 1) & (n_equal + tl.cumsum(tie, 0) <= ties))
        place = base + n_before + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(row_ids + place, tl.zeros([BLOCK], tl.int64) + row, mask=taken)
        tl.store(page_ids + place, page.to(tl.int64), mask=taken)
        if COUNTED:
            tl.store(wanted_out + place, tl.full([BLOCK], 1, tl.int8), mask=taken)
        n_equal += tl.sum(tie, 0)
        n_before += tl.sum(taken.to(tl.int32), 0)
    if COUNTED:
        for start in range(wanted + mine * BLOCK, n_slices, n_chunks * BLOCK):  # what is not wanted, dealt out
            place = start + tl.arange(0, BLOCK)
            spare = place < n_slices
            tl.store(row_ids + base + place, tl.zeros([BLOCK], tl.int64) + (row_list + 1) * N_HEADS - 1, mask=spare)
            tl.store(page_ids + base + place, tl.zeros([BLOCK], tl.int64), mask=spare)
            tl.store(wanted_out + base + place, tl.zeros([BLOCK], tl.int8), mask=spare)


def supported(scores: Tensor, n_slices: int) -> bool:
    """Whether the kernels take these."""
    return shares_supported(scores) and scores.shape[2] > 0 and n_slices > 0


def top_pages(
    scores: Tensor, anchor_lse: Tensor, n_heads: int, n_slices: int, n_wanted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``reference.top_pages`` where ``supported``."""
    rows, heads, n_pages = scores.shape
    n_blocks = triton.cdiv(triton.cdiv(n_pages * n_heads, _CHUNKS), _BLOCK)
    n_chunks = triton.cdiv(n_pages, n_blocks * _BLOCK)
    n_ids, device = rows // n_heads * n_slices, scores.device
    row_ids, page_ids = (torch.empty(n_ids, dtype=torch.int64, device=device) for _ in range(2))
    wanted = None if n_wanted is None else torch.empty(n_ids, dtype=torch.bool, device=device)
    keys = torch.empty(rows, n_pages, dtype=torch.int16, device=device)
    high, low = (torch.empty(rows, n_chunks, 64, dtype=torch.int32, device=device) for _ in range(2))
    totals, grid = head_totals(scores, anchor_lse), (n_chunks, rows)
    count = low if n_wanted is None else n_wanted
    options = {"N_HEADS": n_heads, "CP": triton.next_power_of_2(n_heads * n_chunks), "COUNTED": n_wanted is not None}
    _keys[grid](scores, totals, keys, high, n_pages, n_blocks, heads, triton.next_power_of_2(heads), _BLOCK)
    _low_digits[grid](keys, high, low, count, n_slices, n_pages, n_blocks, BLOCK=_BLOCK, **options)
    out = row_ids, page_ids, row_ids if wanted is None else wanted.view(torch.int8)
    _take[grid](keys, high, low, count, *out, n_slices, n_pages, n_blocks, BLOCK=_BLOCK, **options)
    return row_ids, page_ids, wanted
