"""Which bytes to ask of the disk for a list of slices: a pure function from keys to merged, block-aligned ranges."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .aligned import BLOCK_BYTES
from .format import HEADER_BYTES, PageLayout

MAX_RANGE_BYTES = 1 << 20
Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class ReadPlan:
    """Ranges in file order that bring every distinct slice once, and which rows then repeat another row; all int64.

    Range i is ``sizes[i]`` bytes from ``offsets[i]``, both whole blocks. It has the slices ``firsts[i]`` to
    ``firsts[i + 1]`` (exclusive): slice j is for row ``rows[j]`` and begins ``starts[j]`` bytes into its range.
    ``repeats[k]`` is a copy of ``repeat_of[k]``; rows in a range are never repeats.
    """

    offsets: Int64Array  # [R]
    sizes: Int64Array  # [R]
    firsts: Int64Array  # [R + 1]
    rows: Int64Array  # [U]
    starts: Int64Array  # [U]
    repeats: Int64Array
    repeat_of: Int64Array

    @property
    def n_bytes(self) -> int:
        return int(self.sizes.sum())


def lone_reads(offsets: Int64Array, size: int) -> ReadPlan:
    """A range of ``size`` bytes for each offset, whole blocks both, in the order given, range i for row i."""
    n, none = len(offsets), np.empty(0, np.int64)
    rows = np.arange(n)
    return ReadPlan(offsets, np.full(n, size), np.arange(n + 1), rows, np.zeros(n, np.int64), none, none)


def plan_read(
    page_ids: Int64Array, slice_ids: Int64Array, layout: PageLayout, *, max_range_bytes: int = MAX_RANGE_BYTES
) -> ReadPlan:
    """Ranges in file order for slice ``slice_ids[i]`` of page ``page_ids[i]`` into row i; ids int64 [n], n may be 0.

    Slices whose blocks touch or overlap share a range until it would exceed ``max_range_bytes`` (one slice may be
    longer); a block that no slice needs is never read.
    """
    keys = page_ids * layout.n_slices + slice_ids
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    is_new = np.ones(len(keys), bool)
    is_new[1:] = keys[1:] != keys[:-1]
    rows, keys = order[is_new], keys[is_new]
    offsets = HEADER_BYTES + keys // layout.n_slices * layout.page_stride + keys % layout.n_slices * layout.slice_bytes
    lows = offsets // BLOCK_BYTES * BLOCK_BYTES
    highs = -(-(offsets + layout.slice_bytes) // BLOCK_BYTES) * BLOCK_BYTES
    firsts = np.append(_first_slices(lows, highs, max_range_bytes), len(keys))
    low = lows[firsts[:-1]]
    starts = offsets - np.repeat(low, np.diff(firsts))
    repeat_of = rows[np.cumsum(is_new) - 1][~is_new]
    return ReadPlan(low, highs[firsts[1:] - 1] - low, firsts, rows, starts, order[~is_new], repeat_of)


def _first_slices(lows: Int64Array, highs: Int64Array, most: int) -> Int64Array:
    """Which slices, in file order, begin a range, int64 [R]; ``lows`` and ``highs`` are their blocks, int64 [U]."""
    begins = np.ones(len(lows), bool)
    begins[1:] = lows[1:] > highs[:-1]
    firsts = np.flatnonzero(begins)
    ends = np.append(firsts, len(lows))[1:]
    long = highs[ends - 1] - lows[firsts] > most
    for first, end in zip(firsts[long].tolist(), ends[long].tolist(), strict=True):
        while first < end:
            begins[first] = True
            first += max(int(np.searchsorted(highs[first:end], lows[first] + most, side="right")), 1)
    return np.flatnonzero(begins)
