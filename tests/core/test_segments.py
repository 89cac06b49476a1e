"""Segments of tilted sums at 32 and 16 bits."""

import pytest
import torch
from heads import CPU, all_pairs, fetch, geometry, masses, random_pages, random_query, softmax_over
from torch.testing import assert_close

from kvoffload.completion.anchored import AnchoredCompletionConfig
from kvoffload.completion.offset import OffsetCompletion
from kvoffload.config import RuntimeConfig
from kvoffload.values import Pages

HALF = AnchoredCompletionConfig(segments=8, dtype="bfloat16")
FULL = AnchoredCompletionConfig(segments=8)


def built(config, shape, pages, *, run=1, n_pages=None):
    completion = config.build(shape, 0, CPU)
    completion.reset(random_query(shape, 3)[:, 0], n_pages=pages.n_pages if n_pages is None else n_pages)
    for start in range(0, pages.n_pages, run):
        completion.absorb(pages.run(start, min(start + run, pages.n_pages)))
    return completion


def estimate(completion, query, pages, read):
    return completion.estimate(query, fetch(pages, read), masses(query, pages))


def test_sixteen_bit_sums_are_chosen_by_name():
    [chosen] = RuntimeConfig(completion="anchored:segments=8,dtype=bfloat16").completion
    assert chosen == HALF


def test_sixteen_bit_sums_take_half_the_bytes():
    """All but mass and count of each segment."""
    shape = geometry()
    completion = built(HALF, shape, random_pages(shape, 40))
    assert completion.state_bytes == shape.rows * HALF.index_bytes(160, 8, 16, 4, 2)
    assert HALF.index_bytes(160, 64, 64, 16, 2) < 0.51 * FULL.index_bytes(160, 64, 64, 16, 2)


@pytest.mark.parametrize("loudness", [1.0, 3.0])
@pytest.mark.parametrize("run", [1, 7, 200])
@pytest.mark.parametrize("padded", [False, True])
def test_sixteen_bit_sums_estimate_as_thirty_two_bit_ones_but_for_their_rounding(padded, run, loudness):
    shape = geometry()
    drawn, query = random_pages(shape, 200, padded=padded), random_query(shape)
    pages = Pages(drawn.keys * loudness, drawn.values, drawn.valid)
    read = [(0, 0), (0, 17), (0, 199), (1, 55), (1, 56)]
    half, full = (estimate(built(c, shape, pages, run=run, n_pages=16), query, pages, read) for c in (HALF, FULL))
    assert_close(half.lse, full.lse, atol=0.05 * loudness, rtol=0)
    assert_close(half.output, full.output, atol=0.05 * loudness, rtol=0)


@pytest.mark.parametrize("loudness", [1.0, 10.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("config", [HALF, FULL], ids=["bfloat16", "float32"])
def test_nothing_remains_of_rounded_sums_when_everything_was_fetched(config, padded, loudness):
    shape = geometry()
    drawn, query = random_pages(shape, 60, padded=padded), random_query(shape)
    pages = Pages(drawn.keys * loudness, drawn.values, drawn.valid)
    completion = built(config, shape, pages, run=9)
    assert estimate(completion, query, pages, all_pairs(pages)).lse.isneginf().all()


def one_loud_page(seed, share):
    """A segment's worth of pages whose first has all but ``share`` of the mass under the anchor."""
    shape = geometry(group_size=1)
    pages, anchor = random_pages(shape, 4, seed=seed), random_query(shape, 3)[:, 0]
    along = (anchor / anchor.square().sum(-1, keepdim=True))[:, None]
    pages.keys[:, 0] -= along * (pages.keys[:, 0] @ anchor[..., None])  # logit 0
    for page in (1, 2, 3):
        logits = pages.keys[:, page] @ anchor[..., None]
        pages.keys[:, page] += along * (torch.tensor(share / 3).log() - logits)
    pages.values.add_(5.0)
    return shape, anchor[:, None], pages


@pytest.mark.parametrize("share", [0.2, 1e-2, 1e-3, 1e-4])
def test_what_is_left_of_a_rounded_segment_is_never_wild(share):
    """The mass of what is left stays right (at the anchor), and its mean value stays among the values."""
    for seed in range(20):
        shape, query, pages = one_loud_page(seed, share)
        read = [(0, 0), (1, 0)]
        rest = estimate(built(HALF, shape, pages, run=4, n_pages=32), query, pages, read)
        exact = softmax_over(query, pages, sorted(set(all_pairs(pages)) - set(read)))
        assert_close(rest.lse, exact.lse, atol=0.02, rtol=0)
        assert_close(rest.output, exact.output, atol=3.0, rtol=0)  # standard deviations of a value


def test_a_new_scale_rounds_nothing():
    """The oldest segment is closed, then sixty pages raise the largest exponent one by one."""
    shape = geometry(group_size=1)
    pages, anchor = random_pages(shape, 64), random_query(shape, 3)[:, 0]
    pages.keys[:, 4:] += torch.linspace(0, 3, 60)[:, None, None] * anchor[:, None, None]
    read = [(row, page) for row in range(2) for page in range(4, 64)]
    completion = built(AnchoredCompletionConfig(segments=64, dtype="bfloat16"), shape, pages, n_pages=4 * 64)
    rest = estimate(completion, anchor[:, None], pages, read)
    exact = softmax_over(anchor[:, None], pages, [(row, page) for row in range(2) for page in range(4)])
    assert_close(rest.output, exact.output, atol=1e-5, rtol=2**-8)


def test_the_newest_segment_in_fp32_counts_as_resident_also_behind_offsets():
    shape = geometry()
    completion = built(HALF, shape, random_pages(shape, 40))
    moved = OffsetCompletion(completion, torch.zeros(shape.rows, shape.group_size))
    assert completion.resident_bytes == completion.state_bytes + shape.rows * (8 + 16) * 4
    assert (moved.state_bytes, moved.resident_bytes) == (completion.state_bytes, completion.resident_bytes)
