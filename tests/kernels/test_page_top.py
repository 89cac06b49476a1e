"""Top-K of pages: the reference against its definition, the Triton kernels against the reference."""

import pytest
import torch
from kvoffload_kernels.page_shares.reference import share_pages
from kvoffload_kernels.page_top import reference

kernel = pytest.importorskip("kvoffload_kernels.page_top.kernel", exc_type=ImportError)

SIZES = [(1, 1, 1, 1), (3, 7, 300, 1), (4, 4, 530, 2), (2, 2, 512, 2), (6, 1, 259, 3), (8, 3, 300, 8)]


def masses(rows, heads, n_pages, spread=3.0):
    generator = torch.Generator().manual_seed(rows + heads + n_pages)
    scores = spread * torch.randn(rows, heads, n_pages, generator=generator)
    return scores, spread * torch.randn(rows, heads, generator=generator)


def some(n_entries):
    return sorted({1, min(5, n_entries), n_entries // 3 or 1, n_entries})


@pytest.mark.parametrize(("rows", "heads", "n_pages", "n_heads"), SIZES)
def test_no_page_that_is_left_has_a_larger_share_by_a_step(rows, heads, n_pages, n_heads):
    scores, anchors = masses(rows, heads, n_pages)
    shares = share_pages(scores, anchors).view(-1, n_heads * n_pages)
    for n in some(n_heads * n_pages):
        row_ids, page_ids, _ = reference.top_pages(scores, anchors, n_heads, n)
        flat = (row_ids % n_heads * n_pages + page_ids).view(-1, n)
        assert torch.equal(row_ids.view(-1, n) // n_heads, torch.arange(rows // n_heads)[:, None].expand(-1, n))
        for share, mine in zip(shares, flat, strict=True):
            assert mine.unique().numel() == n
            left = torch.ones(len(share), dtype=torch.bool)
            left[mine] = False
            assert not left.any() or share[left].max() <= share[mine].min() + 1 / reference.STEPS


@pytest.mark.parametrize(("rows", "heads", "n_pages", "n_heads"), SIZES)
def test_the_kernels_take_what_the_reference_takes(rows, heads, n_pages, n_heads):
    scores, anchors = masses(rows, heads, n_pages)
    for n in some(n_heads * n_pages):
        given, expected = (twin.top_pages(scores, anchors, n_heads, n) for twin in (kernel, reference))
        assert torch.equal(given[0], expected[0])
        assert torch.equal(given[1], expected[1])
        assert given[2] is None


@pytest.mark.parametrize("spread", [0.0, 1e-4, 30.0])
def test_equal_shares_and_pages_without_any_are_taken_in_order(spread):
    scores, anchors = masses(4, 2, 600, spread)
    scores[:, :, 5:400] = -torch.inf
    scores[1] = -torch.inf
    for n in (3, 300, 1100, 1200):
        given, expected = (twin.top_pages(scores, anchors, 2, n) for twin in (kernel, reference))
        assert torch.equal(given[0], expected[0])
        assert torch.equal(given[1], expected[1])


@pytest.mark.parametrize("n_wanted", [0, 1, 37, 900])
@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_only_as_many_are_wanted_as_the_device_says(n_wanted, n_heads):
    scores, anchors = masses(4, 3, 310)
    n = 310 * n_heads if n_wanted == 900 else 150
    count = torch.tensor(min(n_wanted, n))
    given, expected = (twin.top_pages(scores, anchors, n_heads, n, count) for twin in (kernel, reference))
    for mine, theirs in zip(given, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert int(given[2].sum()) == int(count) * 4 // n_heads
    best = reference.top_pages(scores, anchors, n_heads, max(int(count), 1))
    if count > 0:
        assert torch.equal(given[1][given[2]], best[1])


@pytest.mark.parametrize(("rows", "heads", "n_pages", "n_heads"), SIZES)
@pytest.mark.parametrize("twin", [reference, kernel], ids=["reference", "triton"])
def test_rows_ascend_whatever_is_wanted_and_however_many_are_equal(twin, rows, heads, n_pages, n_heads):
    scores, anchors = masses(rows, heads, n_pages)
    for shares in (scores, torch.zeros_like(scores)):
        for n in some(n_heads * n_pages):
            for n_wanted in (None, torch.tensor(n // 2), torch.tensor(0)):
                row_ids = twin.top_pages(shares, anchors, n_heads, n, n_wanted)[0]
                assert bool((row_ids.diff() >= 0).all())
