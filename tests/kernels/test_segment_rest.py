"""What is left of tilted segments behind fetched slices: both twins against sums over the tokens that are left."""

from dataclasses import replace

import pytest
import torch
from kvoffload_kernels.completion import reference
from kvoffload_kernels.completion.reference import SegmentSums, Slices, tilted_sums
from torch.testing import assert_close

from kvoffload.completion.anchored import AnchoredCompletion
from kvoffload.completion.segments import Segments
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages

kernel = pytest.importorskip("kvoffload_kernels.completion.kernel", exc_type=ImportError)

ROWS, PAGES, SIZE = 2, 12, 5
CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # kernels/README.md


@pytest.fixture(params=[reference, kernel], ids=["reference", "triton"])
def estimate_rest(request):
    return request.param.estimate_rest


class Case:
    """Pages of ``ROWS`` rows in segments of three pages, and the slices fetched of them for each query row."""

    def __init__(self, fetched, dim=64, value_dim=48, heads=3, dtype=torch.float32, masked=True):
        """``fetched`` lists (query row, page)."""
        generator = torch.Generator().manual_seed(0)
        self.keys = torch.randn(ROWS, PAGES, SIZE, dim, generator=generator).to(dtype)
        self.values = torch.randn(ROWS, PAGES, SIZE, value_dim, generator=generator).to(dtype)
        self.valid = torch.ones(ROWS, PAGES, SIZE, dtype=torch.bool)
        self.valid[1, 0, :3] = not masked
        self.anchor = torch.randn(ROWS, dim, generator=generator) / dim**0.5
        self.logits = torch.einsum("gd,gpsd->gps", self.anchor, self.keys.float())
        self.n_queries = 2
        self.query = (
            self.anchor.repeat_interleave(2, 0)[:, None]
            + 0.5 * torch.randn(ROWS * 2, heads, dim, generator=generator) / dim**0.5
        )
        self.fetched = fetched
        rows, pages = torch.tensor(fetched, dtype=torch.int64).view(-1, 2).unbind(1)
        store_rows = rows // 2
        self.slices = Slices(
            self.keys[store_rows, pages],
            self.values[store_rows, pages],
            self.valid[store_rows, pages],
            rows,
            pages.contiguous(),
        )

    def segments(self, rounding=0.0, sums_dtype=torch.float32):
        shift = self.logits.flatten(1).amax(1)
        log_weight = self.logits - shift[:, None, None]
        log_weight = log_weight.masked_fill(~self.valid, -torch.inf).unflatten(1, (-1, 3)).flatten(2, 3)
        keys, values = (t.unflatten(1, (-1, 3)).flatten(2, 3) for t in (self.keys, self.values))
        sums = tilted_sums(keys, values, log_weight)
        counts = self.valid.unflatten(1, (-1, 3)).flatten(2).sum(-1).float()
        return SegmentSums(
            self.anchor,
            shift,
            sums[..., 0].contiguous(),
            counts,
            sums[..., 1:].to(sums_dtype),
            torch.arange(3, PAGES + 1, 3),
            rounding,
        )

    def definition(self, query_row):
        """Partial over segments of the tokens that are left, in fp64."""
        row, logits, means = query_row // 2, [], []
        for segment in range(PAGES // 3):
            kept = [p for p in range(3 * segment, 3 * segment + 3) if (query_row, p) not in self.fetched]
            counts = self.valid[row, kept]
            k, v = self.keys[row, kept][counts].double(), self.values[row, kept][counts].double()
            if len(k) == 0:
                continue
            weight = (k @ self.anchor[row].double()).exp()
            tilt = self.query[query_row].double() - self.anchor[row].double()
            logits.append(weight.sum().log() + tilt @ (weight @ k) / weight.sum())
            means.append((weight @ v) / weight.sum())
        if not logits:
            return None
        z = torch.stack(logits, -1)
        return (z.softmax(-1) @ torch.stack(means)).float(), z.logsumexp(-1).float()


EVERYTHING_OF_ROW_0 = [(0, p) for p in range(PAGES)]
SOME = [(0, 4), (2, 0), (0, 3), (3, 11), (0, 5), (1, 7), (2, 1), (2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "value_dim", "heads"), [(64, 48, 1), (96, 96, 4), (128, 128, 7)])
@pytest.mark.parametrize("fetched", [[], SOME, EVERYTHING_OF_ROW_0])
def test_the_rest_is_that_of_the_tokens_left(estimate_rest, fetched, dim, value_dim, heads, dtype):
    case = Case(fetched, dim, value_dim, heads, dtype)
    output, lse = estimate_rest(case.query, case.segments(), case.slices)
    for query_row in range(2 * ROWS):
        expected = case.definition(query_row)
        if expected is None:
            assert lse[query_row].isneginf().all()
            assert not output[query_row].any()
        else:
            assert_close((output[query_row], lse[query_row]), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_may_lie_among_others(estimate_rest, dtype):
    case = Case(SOME, dtype=dtype)
    s, n = case.slices, len(SOME)
    places = torch.arange(n) * 7 % 16  # distinct, in another order
    keys, values = (
        torch.full((16, *t.shape[1:]), torch.nan, dtype=t.dtype).index_copy(0, places, t) for t in (s.keys, s.values)
    )
    given = estimate_rest(case.query, case.segments(), replace(s, keys=keys, values=values, places=places))
    assert_close(given, estimate_rest(case.query, case.segments(), s), **CLOSE)


def test_where_rounded_sums_say_nothing_the_whole_segments_means_stand_in():
    case = Case(SOME)
    segments = case.segments(rounding=0.9, sums_dtype=torch.bfloat16)
    given = kernel.estimate_rest(case.query, segments, case.slices)
    assert_close(given, reference.estimate_rest(case.query, segments, case.slices), **CLOSE)
    exact = reference.estimate_rest(case.query, case.segments(), case.slices)
    assert (given[0] - exact[0]).abs().max() > 0.01  # the case is one where it matters


def test_it_is_what_the_anchored_completion_says():
    """The same pages in ``anchored``: segments, removal and estimate agree."""
    case = Case(SOME, dim=32, value_dim=24)
    geometry = Geometry(1, ROWS, 3, 32, 24, SIZE, torch.float32, 1.0)
    completion = AnchoredCompletion(Segments(PAGES // 3, geometry, torch.device("cpu")))
    completion.reset(case.anchor, n_pages=PAGES)
    completion.absorb(Pages(case.keys, case.values, case.valid))
    s = case.slices
    fetched = Fetched(s.keys, s.values, s.valid, s.row_ids, torch.tensor([page for _, page in SOME]))
    expected = completion.estimate(case.query, fetched, torch.zeros(0))
    given = kernel.estimate_rest(case.query, case.segments(), case.slices)
    assert_close(given, (expected.output, expected.lse), **CLOSE)


def test_a_segment_without_a_token_is_empty_whatever_mass_rounding_leaves(estimate_rest):
    case = Case(EVERYTHING_OF_ROW_0)
    segments = case.segments()
    output, lse = estimate_rest(case.query, replace(segments, mass=segments.mass * 1.001), case.slices)
    assert lse[0].isneginf().all()
    assert not output[0].any()
    assert lse[1:].isfinite().all()


def test_more_segments_than_are_weighed_at_a_time(monkeypatch):
    monkeypatch.setattr(kernel, "_SEGMENTS", 1)
    case = Case(SOME)
    expected = reference.estimate_rest(case.query, case.segments(), case.slices)
    assert_close(kernel.estimate_rest(case.query, case.segments(), case.slices), expected, **CLOSE)
