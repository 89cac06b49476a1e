"""Shares of pages: both twins against their definition in fp64."""

import pytest
import torch
from kvoffload_kernels.page_shares import reference
from torch.testing import assert_close

kernel = pytest.importorskip("kvoffload_kernels.page_shares.kernel", exc_type=ImportError)

TWINS = pytest.mark.parametrize("twin", [reference, kernel], ids=["reference", "triton"])


def masses(rows, heads, n_pages, spread=4.0):
    generator = torch.Generator().manual_seed(rows + heads + n_pages)
    scores = spread * torch.randn(rows, heads, n_pages, generator=generator)
    return scores, spread * torch.randn(rows, heads, generator=generator)


@TWINS
@pytest.mark.parametrize(
    ("rows", "heads", "n_pages"), [(1, 1, 1), (3, 7, 300), (2, 4, 1024), (2, 16, 2051), (4, 3, 256)]
)
def test_a_share_is_a_pages_part_of_the_mass_summed_over_heads(twin, rows, heads, n_pages):
    scores, anchors = masses(rows, heads, n_pages)
    mass = scores.double().exp()
    expected = (mass / (mass.sum(-1) + anchors.double().exp())[..., None]).sum(1).log()
    assert_close(twin.share_pages(scores, anchors).double(), expected, atol=1e-5, rtol=1e-5)


@TWINS
def test_masses_beyond_the_range_of_exponentials_are_shared(twin):
    scores, anchors = masses(2, 3, 40)
    assert_close(
        twin.share_pages(scores + 500, anchors + 500), reference.share_pages(scores, anchors), atol=1e-4, rtol=0
    )


@TWINS
def test_pages_without_mass_have_no_share_and_the_others_keep_theirs(twin):
    scores, anchors = masses(2, 3, 40)
    scores[:, :, 5:9], scores[1] = -torch.inf, -torch.inf
    shares = twin.share_pages(scores, anchors)
    assert shares[:, 5:9].isneginf().all()
    assert shares[1].isneginf().all()
    kept = torch.ones(40, dtype=torch.bool)
    kept[5:9] = False
    assert_close(shares[0, kept], twin.share_pages(scores[:1, :, kept], anchors[:1])[0], atol=1e-6, rtol=0)


@TWINS
def test_heads_without_anchors_share_all_of_their_mass(twin):
    scores, anchors = masses(2, 3, 40)
    total = twin.share_pages(scores, torch.full_like(anchors, -torch.inf)).exp().sum(-1)
    assert_close(total, torch.full((2,), 3.0))


@TWINS
def test_no_page_has_no_share(twin):
    assert twin.share_pages(torch.zeros(2, 3, 0), torch.zeros(2, 3)).shape == (2, 0)
