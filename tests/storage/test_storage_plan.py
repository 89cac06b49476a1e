"""Plans against ranges worked out by hand: header 4096, pages from there on, blocks of 4096."""

from typing import NamedTuple

import numpy as np
from kvoffload_storage.format import PageLayout
from kvoffload_storage.plan import ReadPlan, plan_read

EIGHT_KIB = PageLayout(n_slices=4, slice_bytes=8192)
TINY = PageLayout(n_slices=3, slice_bytes=48)
ODD = PageLayout(n_slices=2, slice_bytes=5000)


class ByteRange(NamedTuple):
    """One read, and for which rows the slices that start there are."""

    offset: int
    n_bytes: int
    rows: tuple[int, ...]
    starts: tuple[int, ...]


def ranges(plan: ReadPlan) -> tuple[ByteRange, ...]:
    parts = [slice(*ends) for ends in zip(plan.firsts[:-1], plan.firsts[1:], strict=True)]
    return tuple(
        ByteRange(offset, size, tuple(plan.rows[part].tolist()), tuple(plan.starts[part].tolist()))
        for offset, size, part in zip(plan.offsets.tolist(), plan.sizes.tolist(), parts, strict=True)
    )


def plan(layout: PageLayout, *keys: tuple[int, int], max_range_bytes: int = 1 << 20) -> ReadPlan:
    page_ids, slice_ids = np.array(keys, dtype=np.int64).reshape(-1, 2).T
    return plan_read(page_ids, slice_ids, layout, max_range_bytes=max_range_bytes)


def test_nothing_asked_is_nothing_read() -> None:
    nothing = plan(EIGHT_KIB)
    assert (ranges(nothing), len(nothing.repeats), nothing.n_bytes) == ((), 0, 0)


def test_a_lone_aligned_slice_is_read_alone() -> None:
    # page 2 at 4096 + 2 * 32768 = 69632, slice 1 8192 further
    assert ranges(plan(EIGHT_KIB, (2, 1))) == (ByteRange(77824, 8192, (0,), (0,)),)


def test_adjacent_slices_merge_also_over_a_page_border() -> None:
    # page 0 slice 3 at 4096 + 24576 = 28672, page 1 slice 0 at 36864
    assert ranges(plan(EIGHT_KIB, (1, 0), (0, 3))) == (ByteRange(28672, 16384, (1, 0), (0, 8192)),)


def test_a_gap_is_not_read_across() -> None:
    assert ranges(plan(EIGHT_KIB, (0, 0), (0, 2))) == (
        ByteRange(4096, 8192, (0,), (0,)),
        ByteRange(20480, 8192, (1,), (0,)),
    )


def test_slices_of_one_block_share_its_read() -> None:
    # page 1 at 8192; slices 0 and 2 lie in one block, 48 bytes apart
    assert ranges(plan(TINY, (1, 2), (1, 0))) == (ByteRange(8192, 4096, (1, 0), (0, 96)),)


def test_pages_whose_blocks_touch_merge() -> None:
    assert ranges(plan(TINY, (0, 1), (1, 1))) == (ByteRange(4096, 8192, (0, 1), (48, 4144)),)


def test_an_odd_slice_is_rounded_out_to_its_blocks() -> None:
    # slice 1 of page 0: bytes 9096 to 14096, hence blocks 8192 to 16384
    assert ranges(plan(ODD, (0, 1))) == (ByteRange(8192, 8192, (0,), (904,)),)
    assert ODD.slice_cost_bytes == 8192
    assert ODD.page_stride == 12288


def test_a_run_is_cut_at_the_longest_range() -> None:
    keys = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert ranges(plan(EIGHT_KIB, *keys, max_range_bytes=16384)) == (
        ByteRange(4096, 16384, (0, 1), (0, 8192)),
        ByteRange(20480, 16384, (2, 3), (0, 8192)),
        ByteRange(36864, 8192, (4,), (0,)),
    )


def test_one_slice_may_be_longer_than_the_longest_range() -> None:
    assert ranges(plan(EIGHT_KIB, (0, 0), (0, 1), max_range_bytes=4096)) == (
        ByteRange(4096, 8192, (0,), (0,)),
        ByteRange(12288, 8192, (1,), (0,)),
    )


def test_repeats_are_read_once_and_copied() -> None:
    repeated = plan(EIGHT_KIB, (2, 1), (0, 0), (2, 1), (2, 1))
    assert ranges(repeated) == (ByteRange(4096, 8192, (1,), (0,)), ByteRange(77824, 8192, (0,), (0,)))
    assert (repeated.repeats.tolist(), repeated.repeat_of.tolist()) == ([2, 3], [0, 0])
    assert repeated.n_bytes == 16384


def test_whole_pages_are_slices_of_another_layout() -> None:
    assert ranges(plan(ODD.whole_pages(), (0, 0), (1, 0))) == (ByteRange(4096, 24576, (0, 1), (0, 12288)),)
