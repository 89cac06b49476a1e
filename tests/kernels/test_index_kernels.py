"""Scoring of pages and attention over the packed keys, in Triton's interpreter, against the plain-torch references;
the references against their definition in fp64."""

import pytest
import torch
from kvoffload_kernels.page_scores import reference
from torch.testing import assert_close

kernel = pytest.importorskip("kvoffload_kernels.page_scores.kernel", exc_type=ImportError)
scores = pytest.importorskip("kvoffload_kernels.page_scores.scores", exc_type=ImportError)

ROWS = 3
CLOSE = {"atol": 1e-3, "rtol": 1e-5}  # kernels/README.md


def index(dim, bits, n_groups=3, group=32, heads=4, seed=0):
    """Queries, and codes, zeros and steps in buffers with room for more groups, as a growing index has them."""
    generator = torch.Generator().manual_seed(seed)
    keys = 3 * torch.randn(ROWS, n_groups + 1, group, dim, generator=generator)
    query = torch.randn(ROWS, heads, dim, generator=generator) / dim**0.5
    return query, *(t[:, :n_groups] for t in reference.quantise(keys, None, bits)), bits


def definition(query, codes, zero, step, bits, n_tokens, missing, softcap=None):
    """Logits of the tokens in fp64, and their keys."""
    keys = reference.restore(codes, zero, step, bits).flatten(1, 2)[:, :n_tokens].double()
    logits = query.double() @ keys.mT
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    if missing is not None:
        for row, count in enumerate(missing.tolist()):
            logits[row, :, :count] = -torch.inf
    return logits, keys


def page_mask(n_queries, n_pages, seed=5):
    excluded = torch.rand(ROWS * n_queries, n_pages, generator=torch.Generator().manual_seed(seed)) < 0.4
    excluded[0, :] = True
    excluded[-1, :] = False
    return excluded


@pytest.mark.parametrize("missing", [None, torch.tensor([0, 5, 41])])
@pytest.mark.parametrize(
    ("dim", "bits", "heads"), [(64, 2, 1), (96, 2, 7), (128, 2, 4), (256, 2, 16), (80, 1, 3), (72, 1, 2), (64, 4, 9)]
)
@pytest.mark.parametrize("twin", [reference, kernel], ids=["reference", "triton"])
def test_page_masses_are_those_of_the_restored_keys(twin, dim, bits, heads, missing):
    given = index(dim, bits, heads=heads)
    n_tokens = 2 * 32 + 24  # the last group is not full
    scores = twin.score_pages(*given, n_tokens=n_tokens, page_size=8, missing=missing)
    logits, _ = definition(*given, n_tokens, missing)
    assert_close(scores.double(), logits.unflatten(-1, (-1, 8)).logsumexp(-1), **CLOSE)
    bounded = twin.score_pages(*given, n_tokens=n_tokens, page_size=8, missing=missing, newest=torch.tensor([6]))
    assert torch.equal(bounded[..., :7], scores[..., :7])
    assert bounded[..., 7:].isneginf().all()


@pytest.mark.parametrize(("group", "page_size"), [(16, 16), (32, 1), (64, 16), (128, 32)])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masses_at_other_groups_and_pages(bits, group, page_size):
    given = index(128, bits, n_groups=2, group=group)
    masses = kernel.score_pages(*given, n_tokens=2 * group, page_size=page_size)
    logits, _ = definition(*given, 2 * group, None)
    assert_close(masses.double(), logits.unflatten(-1, (-1, page_size)).logsumexp(-1), **CLOSE)


@pytest.mark.parametrize(("programs", "n_groups"), [(1, 5), (1, 19), (12, 9)])
def test_a_program_takes_several_groups(monkeypatch, programs, n_groups):
    monkeypatch.setattr(scores, "_PROGRAMS", programs)
    given, missing = index(64, 2, n_groups=n_groups), torch.tensor([0, 5, 41])
    options = {"n_tokens": n_groups * 32 - 8, "page_size": 8, "missing": missing}
    assert_close(kernel.score_pages(*given, **options), reference.score_pages(*given, **options), **CLOSE)


@pytest.mark.parametrize("n_queries", [1, 2])
@pytest.mark.parametrize("missing", [None, torch.tensor([0, 5, 41])])
@pytest.mark.parametrize(
    ("dim", "bits", "heads", "softcap"), [(64, 2, 4, None), (96, 2, 14, 2.0), (128, 1, 2, None), (64, 4, 8, None)]
)
@pytest.mark.parametrize("twin", [reference, kernel], ids=["reference", "triton"])
def test_attention_is_over_the_restored_keys_of_pages_that_are_left(
    twin, dim, bits, heads, softcap, missing, n_queries
):
    given = index(dim, bits, heads=heads)
    n_tokens = 2 * 32 + 24
    excluded = page_mask(n_queries, n_tokens // 8)
    mean, lse = twin.attend_index(*given, excluded=excluded, page_size=8, missing=missing, softcap=softcap)
    logits, keys = definition(*given, n_tokens, missing, softcap)
    for row in range(ROWS):
        for head in range(heads):
            gone = excluded[row * n_queries + head // (heads // n_queries)].repeat_interleave(8)
            z = logits[row, head].masked_fill(gone, -torch.inf)
            if z.isneginf().all():
                assert lse[row, head].isneginf()
                assert not mean[row, head].any()
                continue
            assert_close(lse[row, head].double(), z.logsumexp(-1), **CLOSE)
            assert_close(mean[row, head].double(), z.softmax(-1) @ keys[row], **CLOSE)


def test_many_splits_give_what_one_gives(monkeypatch):
    given, excluded = index(64, 2, n_groups=7), page_mask(1, 7 * 4)
    whole = kernel.attend_index(*given, excluded=excluded, page_size=8)
    monkeypatch.setattr(kernel, "_PROGRAMS", 1)
    assert_close(kernel.attend_index(*given, excluded=excluded, page_size=8), whole, atol=1e-4, rtol=1e-4)


def test_no_page_at_all_scores_nothing_and_is_empty():
    given = index(64, 2)
    assert kernel.score_pages(*given, n_tokens=0, page_size=8).shape == (ROWS, 4, 0)
    mean, lse = kernel.attend_index(*given, excluded=torch.zeros(ROWS, 0, dtype=torch.bool), page_size=8)
    assert not mean.any()
    assert lse.isneginf().all()


def test_large_queries_do_not_overflow():
    query, *rest = index(64, 2)
    given = kernel.score_pages(query * 1e4, *rest, n_tokens=64, page_size=8)
    logits, _ = definition(query * 1e4, *rest, 64, None)
    assert_close(given.double(), logits.unflatten(-1, (-1, 8)).logsumexp(-1), atol=2, rtol=2e-5)
