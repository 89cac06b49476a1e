"""Which bytes to ask of the disk for a list of slices: a pure function from keys to merged, block-aligned ranges."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .aligned import BLOCK_BYTES
from .format import HEADER_BYTES, PageLayout

MAX_RANGE_BYTES = 1 << 20
Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class ByteRange:
    """One read: ``n_bytes`` from ``offset``, both whole blocks; row ``rows[i]`` is the slice at ``starts[i]`` in it."""

    offset: int
    n_bytes: int
    rows: tuple[int, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class ReadPlan:
    """Ranges that bring every distinct slice once, and which rows then repeat another row.

    ``repeats[i]`` is a copy of ``repeat_of[i]``; rows in a range are never repeats.
    """

    ranges: tuple[ByteRange, ...]
    repeats: tuple[int, ...]
    repeat_of: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return sum(byte_range.n_bytes for byte_range in self.ranges)


def plan_read(
    page_ids: Int64Array, slice_ids: Int64Array, layout: PageLayout, *, max_range_bytes: int = MAX_RANGE_BYTES
) -> ReadPlan:
    """Ranges in file order for slice ``slice_ids[i]`` of page ``page_ids[i]`` into row i; ids int64 [n], n may be 0.

    Slices whose blocks touch or overlap share a range until it would exceed ``max_range_bytes`` (one slice may be
    longer); a block that no slice needs is never read.
    """
    keys, rows, inverse = np.unique(page_ids * layout.n_slices + slice_ids, return_index=True, return_inverse=True)
    offsets = HEADER_BYTES + keys // layout.n_slices * layout.page_stride + keys % layout.n_slices * layout.slice_bytes
    ranges = tuple(_ranges(offsets, rows, layout.slice_bytes, max_range_bytes))
    source = rows[inverse]
    repeats = np.flatnonzero(source != np.arange(len(source)))
    return ReadPlan(ranges, tuple(repeats.tolist()), tuple(source[repeats].tolist()))


def _ranges(offsets: Int64Array, rows: Int64Array, slice_bytes: int, max_range_bytes: int) -> Iterator[ByteRange]:
    """Cut sorted slice offsets, int64 [n], into ranges."""
    # Plain integers: this loop runs once per slice of every decode step, and numpy scalars cost ten times as much.
    starts, row_ids = offsets.tolist(), rows.tolist()
    lows = (offsets // BLOCK_BYTES * BLOCK_BYTES).tolist()
    highs = (-(-(offsets + slice_bytes) // BLOCK_BYTES) * BLOCK_BYTES).tolist()
    first = 0
    for i in range(1, len(starts) + 1):
        if i < len(starts) and lows[i] <= highs[i - 1] and highs[i] - lows[first] <= max_range_bytes:
            continue
        low = lows[first]
        inside = tuple([start - low for start in starts[first:i]])
        yield ByteRange(low, highs[i - 1] - low, tuple(row_ids[first:i]), inside)
        first = i
