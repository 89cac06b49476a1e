"""Each of the parts of a step of fixed shapes: the kernel against the reference, and references against what they stand
for."""

from dataclasses import replace

import pytest
import torch
from kvoffload_kernels.completion import reference as completion
from kvoffload_kernels.completion.reference import SegmentSums, Slices, Tilt, slice_sums, tilted_sums
from kvoffload_kernels.decode_step import reference
from kvoffload_kernels.merge.reference import merge_parts
from kvoffload_kernels.sparse_decode.reference import attend_slices
from torch.testing import assert_close

kernel = pytest.importorskip("kvoffload_kernels.decode_step.kernel", exc_type=ImportError)
slice_kernel = pytest.importorskip("kvoffload_kernels.decode_step.slices", exc_type=ImportError)

CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # kernels/README.md
ROWS, PAGES = 3, 12
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*sizes, seed=0, dtype=torch.float32):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "value_dim", "heads"), [(64, 48, 1), (96, 96, 3), (128, 128, 7)])
@pytest.mark.parametrize(
    ("n_anchors", "place", "seen_rows", "softcap"), [(96, 95, 1, None), (37, 0, ROWS, 1.5), (130, 64, 1, None)]
)
def test_the_newest_token_is_put_in_place_and_attended_to(
    n_anchors, place, seen_rows, softcap, dim, value_dim, heads, dtype
):
    query, keys, values = (random(ROWS, n, d, dtype=dtype) for n, d in ((heads, dim), (1, dim), (1, value_dim)))
    before = random(ROWS, n_anchors, dim, seed=1, dtype=dtype), random(ROWS, n_anchors, value_dim, seed=2, dtype=dtype)
    for buffer in before:
        buffer[:, place] = torch.nan  # what lies there must not be read
    seen = random(seen_rows, n_anchors, seed=3) > -0.5
    seen[:, place] = True
    given = []
    for twin in (kernel, reference):
        anchors, scaled = tuple(buffer.clone() for buffer in before), torch.full((ROWS, heads, dim), torch.nan)
        options = {"seen": seen, "scale": dim**-0.5, "softcap": softcap}
        partial = twin.begin(query, keys, values, anchors, torch.tensor([place]), scaled, **options)
        given.append((*partial, scaled, *anchors))
    assert_close(given[0][:2], given[1][:2], **CLOSE)
    for a, b in zip(given[0][2:], given[1][2:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("chunk", [4, 1024])
@pytest.mark.parametrize("size", [2, 5, 16, 64])
@pytest.mark.parametrize("row_ids", [[], [2], [0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2]], ids=len)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_slices_are_all_of_them(row_ids, size, chunk, dtype, monkeypatch):
    monkeypatch.setattr(slice_kernel, "_CHUNK", chunk)
    monkeypatch.setattr(slice_kernel, "_PROGRAMS", 2 * ROWS)
    pages = random(len(row_ids), 2, size, 32, dtype=dtype)
    given = random(ROWS, 3, 32, seed=1), pages[:, 0], pages[:, 1], torch.tensor(row_ids, dtype=torch.int64)
    wanted = (torch.arange(len(row_ids)) % 3 != 1)[:, None].expand(-1, size)
    for valid in (None, wanted, random(len(row_ids), size, seed=4) > 0):
        assert slice_kernel.takes_slices(3, *given[1:3], len(row_ids))
        parts, sums = slice_kernel.attend_slices(*given, valid, None)
        assert_close(reference.joined(parts), attend_slices(*given, valid, None), **CLOSE)
        assert sums is None
        tilt = Tilt(random(ROWS, 32, seed=2), random(ROWS, seed=3) + 10)
        tilted, sums = slice_kernel.attend_slices(*given, valid, None, tilt=tilt)
        for a, b in zip(tilted, parts, strict=True):
            assert torch.equal(a, b)
        assert_close(sums, reference.attend_slices(*given, valid, None, tilt=tilt)[1], **CLOSE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "value_dim", "heads"), [(64, 48, 1), (96, 96, 3), (128, 128, 7), (256, 256, 16)])
def test_sums_of_slices_at_every_head_size(dim, value_dim, heads, dtype):
    row_ids = torch.tensor([0, 0, 2, 2, 2])
    keys, values = (random(len(row_ids), 16, d, seed=d, dtype=dtype) for d in (dim, value_dim))
    query, valid = random(ROWS, heads, dim, seed=1) / dim**0.5, random(len(row_ids), 16, seed=4) > 0
    given = query, keys, values, row_ids, valid, 20.0
    tilt = Tilt(random(ROWS, dim, seed=2) / dim**0.5, random(ROWS, seed=3))
    parts, sums = slice_kernel.attend_slices(*given, tilt=tilt)
    expected, expected_sums = reference.attend_slices(*given, tilt=tilt)
    assert_close(reference.joined(parts), reference.joined(expected), **CLOSE)
    assert_close(sums, expected_sums, **CLOSE)


@pytest.mark.parametrize("size", [5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_slices_that_lie_elsewhere_are_the_same_to_the_bit(size, dtype):
    row_ids = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2])
    pages, places = random(slice_kernel._MOST_SLICES + 1, 2, size, 32, dtype=dtype), torch.randperm(40)[: len(row_ids)]
    query, valid = random(ROWS, 3, 32, seed=1), random(len(row_ids), size, seed=4) > 0
    assert slice_kernel.takes_slices(3, pages[:, 0], pages[:, 1], len(row_ids))
    tilt = Tilt(random(ROWS, 32, seed=2), random(ROWS, seed=3))
    given = slice_kernel.attend_slices(query, pages[:, 0], pages[:, 1], row_ids, valid, None, places, tilt)
    expected = slice_kernel.attend_slices(query, pages[places, 0], pages[places, 1], row_ids, valid, None, tilt=tilt)
    for ours, theirs in zip(given, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_count_is_not_read(dtype):
    row_ids, size = torch.tensor([0, 0, 2, 2, 2]), 5
    pages, valid = random(len(row_ids), 2, size, 32, dtype=dtype), random(len(row_ids), size, seed=4) > 0
    pages[~valid[:, None].expand(-1, 2, -1)] = torch.nan
    tilt = Tilt(random(ROWS, 32, seed=2), random(ROWS, seed=3))
    given = slice_kernel.attend_slices(random(ROWS, 3, 32), pages[:, 0], pages[:, 1], row_ids, valid, None, tilt=tilt)
    assert all(t.isfinite().all() for t in given[1])
    assert reference.joined(given[0])[0].isfinite().all()


def test_what_is_too_much_for_every_program_to_look_at_is_left_to_others():
    query, slices = torch.zeros(1, 2, 8), torch.zeros(slice_kernel._MOST_SLICES + 1, 4, 8)
    assert slice_kernel.takes_slices(2, slices, slices, slice_kernel._MOST_SLICES)
    assert not slice_kernel.takes_slices(2, slices, slices, slice_kernel._MOST_SLICES + 1)
    assert not slice_kernel.takes_slices(2, slices[:3, :1], slices[:3, :1], 3)
    assert not slice_kernel.takes_slices(65, slices, slices, 3)
    wide = torch.zeros(3, 16, 256)
    assert slice_kernel.takes_slices(32, wide, wide, 3)
    assert not slice_kernel.takes_slices(64, wide, wide, 3)
    assert not slice_kernel.takes_slices(4, wide.repeat(1, 4, 1), wide.repeat(1, 4, 1), 3)
    assert slice_kernel.takes_slices(64, wide.bfloat16(), wide.bfloat16(), 3)
    anchors = torch.zeros(1, kernel._MOST_ANCHORS + 1, 8)
    assert not kernel.begins(query, (anchors, anchors))


class Rest:
    """Pages of ``ROWS`` rows in segments of three pages and one that is not in use, and slices fetched of them."""

    def __init__(self, fetched, dim, value_dim, heads, dtype, size=5):
        keys, values = (random(ROWS, PAGES, size, d, seed=d, dtype=dtype) for d in (dim, value_dim))
        valid = torch.ones(ROWS, PAGES, size, dtype=torch.bool)
        valid[1, 0, :3] = False
        anchor = random(ROWS, dim, seed=5) / dim**0.5
        self.query = anchor[:, None] + 0.5 * random(ROWS, heads, dim, seed=6) / dim**0.5
        logits = torch.einsum("gd,gpsd->gps", anchor, keys.float())
        shift = logits.flatten(1).amax(1)
        log_weight = (logits - shift[:, None, None]).masked_fill(~valid, -torch.inf)
        sums, counts = (
            torch.cat([t.unflatten(1, (-1, 3)).sum(2), torch.zeros_like(t[:, :1])], 1)
            for t in (tilted_sums(keys, values, log_weight), valid.sum(-1, keepdim=True).float())
        )
        ends = torch.tensor([*range(3, PAGES + 1, 3), torch.iinfo(torch.int64).max])
        mass = sums[..., 0].contiguous()
        self.segments = SegmentSums(anchor, shift, mass, counts[..., 0].contiguous(), sums[..., 1:].contiguous(), ends)
        rows, pages = torch.tensor(fetched, dtype=torch.int64).view(-1, 2).T.contiguous()
        slices = Slices(keys[rows, pages], values[rows, pages], valid[rows, pages], rows, pages)
        self.slices = replace(slices, sums=slice_sums(Tilt(anchor, shift), slices, dim))

    @property
    def unsummed(self):
        return replace(self.slices, sums=None)


SOME = [(0, 4), (0, 0), (0, 5), (0, 3), (1, 11), (1, 7), (2, 3), (2, 1), (2, 2)]
EVERYTHING_OF_ROW_0 = [(0, page) for page in range(PAGES)]


@pytest.mark.parametrize("chunk", [4, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "value_dim", "heads"), [(64, 48, 1), (96, 96, 4), (128, 128, 7)])
@pytest.mark.parametrize("fetched", [[], SOME, EVERYTHING_OF_ROW_0], ids=len)
def test_every_segment_is_what_its_slices_leave(fetched, dim, value_dim, heads, dtype, chunk, monkeypatch):
    monkeypatch.setattr(slice_kernel, "_CHUNK", chunk)
    case = Rest(fetched, dim, value_dim, heads, dtype)
    given = slice_kernel.rest_of_segments(case.query, case.segments, case.slices)
    expected = reference.rest_of_segments(case.query, case.segments, case.unsummed)
    there = ~expected[1].isneginf().all(-1)
    assert_close(given[1], expected[1], **CLOSE)
    assert_close(given[0][there], expected[0][there], **CLOSE)
    assert given[0].isfinite().all()
    whole = completion.estimate_rest(case.query, case.segments, case.unsummed)
    for parts in (given, expected):
        assert_close(reference.joined(parts), whole, **CLOSE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_lose_slices_that_lie_elsewhere_or_are_summed_too(dtype):
    case = Rest(SOME, 64, 48, 3, dtype)
    expected = reference.rest_of_segments(case.query, case.segments, case.unsummed)
    for slices in (scattered(case.unsummed), case.slices):
        assert_close(reference.rest_of_segments(case.query, case.segments, slices), expected)


def scattered(slices):
    """The same ones among others, in another order."""
    n = len(slices.row_ids)
    places = torch.randperm(2 * n, generator=torch.Generator().manual_seed(9))[:n]
    keys, values = (
        torch.full((2 * n, *t.shape[1:]), torch.nan, dtype=t.dtype).index_copy(0, places, t)
        for t in (slices.keys, slices.values)
    )
    return replace(slices, keys=keys, values=values, places=places)


def test_where_rounded_sums_say_nothing_the_whole_segments_means_stand_in():
    case = Rest(SOME, 64, 48, 3, torch.float32)
    segments = replace(case.segments, sums=case.segments.sums.bfloat16(), rounding=0.9)
    given = slice_kernel.rest_of_segments(case.query, segments, case.slices)
    assert_close(given, reference.rest_of_segments(case.query, segments, case.unsummed), **CLOSE)
    exact = reference.rest_of_segments(case.query, case.segments, case.unsummed)
    assert (given[0] - exact[0]).abs().max() > 0.01  # the case is one where it matters


@pytest.mark.parametrize(("n_slices", "n_rests"), [(1, 1), (5, 33), (32, 0), (1, 20)])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (3, 96), (4, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_end_merges_everything_and_counts_the_rest(dtype, heads, dim, n_slices, n_rests):
    anchors, slices = (random(ROWS, heads, dim), random(ROWS, heads)), None
    slices = random(ROWS, n_slices, heads, dim, seed=2), 3 * random(ROWS, n_slices, heads, seed=3)
    slices[1][1] = -torch.inf
    shared = n_rests == 33
    rest = random(ROWS, n_rests, 1 if shared else heads, dim, seed=4), 3 * random(ROWS, n_rests, heads, seed=5)
    rest[1][0] = -torch.inf
    given = []
    for twin in (kernel, reference):
        masses = random(ROWS, heads, seed=6)
        given.append((*twin.finish(anchors, slices, rest if n_rests else None, masses, dtype), masses))
    bound = {"atol": 1e-5, "rtol": 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps}
    assert_close(given[0], given[1], **bound)
    parts = [anchors, reference.joined(slices)] + ([reference.joined(rest)] if n_rests else [])
    output, lse = merge_parts(*zip(*parts, strict=True))
    assert_close(given[0][:2], (output.to(dtype), lse), **bound)
    before = random(ROWS, heads, seed=6)
    expected = (parts[-1][1] - given[1][1]).exp() if n_rests else torch.zeros_like(before)
    assert_close(given[0][2], before + expected, atol=1e-5, rtol=1e-5)


def test_with_nothing_else_the_anchors_are_the_end_to_the_bit():
    anchors, masses = (random(ROWS, 2, 64), random(ROWS, 2)), torch.zeros(ROWS, 2)
    nothing = torch.full((ROWS, 4, 2, 64), torch.nan), torch.full((ROWS, 4, 2), -torch.inf)
    output, lse = kernel.finish(anchors, nothing, nothing, masses, torch.float32)
    assert torch.equal(output, anchors[0])
    assert_close(lse, anchors[1])
    assert not masses.any()
