"""Scoring of pages and attention over transform-coded keys, in Triton's interpreter, against the plain-torch
references; the references against restored keys in fp64."""

import pytest
import torch
from kvoffload_kernels.transform_code import reference
from torch.testing import assert_close

kernel = pytest.importorskip("kvoffload_kernels.transform_code.kernel", exc_type=ImportError)

ROWS = 3
CLOSE = {"atol": 1e-3, "rtol": 1e-5}  # kernels/README.md


def index(dim, bits, n_tokens=104, heads=4, seed=0):
    """Queries, and codes that lie in a buffer with room for more, under a transform fitted to them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(ROWS, dim, dim, generator=generator) / dim**0.5
    keys = 3 * torch.randn(ROWS, n_tokens + 24, dim, generator=generator) @ mix + 2
    query = torch.randn(ROWS, heads, dim, generator=generator) / dim**0.5
    mean = keys.mean(1).half()
    centred = keys - mean.float()[:, None]
    moment = torch.eye(dim).expand(ROWS, -1, -1)
    widths = reference.tier_widths(bits, dim)
    analysis, synthesis = (
        t[..., : sum(widths)].contiguous() for t in reference.fit(centred.mT @ centred / len(keys), moment)
    )
    levels = reference.fit_levels(centred @ analysis, torch.ones(keys.shape[:2]), widths)
    codes = reference.encode(keys, mean, analysis, levels)[:, :n_tokens]
    return query, codes, mean, synthesis.half(), levels


def definition(query, codes, mean, synthesis, levels, missing, softcap=None):
    """Logits of the tokens in fp64, and their keys."""
    keys = reference.decode(codes, levels).double() @ synthesis.double().mT + mean.double()[:, None]
    logits = query.double() @ keys.mT
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    if missing is not None:
        for row, count in enumerate(missing.tolist()):
            logits[row, :, :count] = -torch.inf
    return logits, keys


@pytest.mark.parametrize("missing", [None, torch.tensor([0, 5, 41])])
@pytest.mark.parametrize(
    ("dim", "bits", "heads"), [(64, 2.25, 1), (96, 2.0, 7), (128, 2.25, 4), (256, 1.0, 16), (64, 0.25, 2), (80, 2.5, 3)]
)
@pytest.mark.parametrize("twin", [reference, kernel], ids=["reference", "triton"])
def test_page_masses_are_those_of_the_restored_keys(twin, dim, bits, heads, missing):
    given = index(dim, bits, heads=heads)
    scores = twin.score_pages(*given, page_size=8, missing=missing)
    logits, _ = definition(*given, missing)
    assert_close(scores.double(), logits.unflatten(-1, (-1, 8)).logsumexp(-1), **CLOSE)
    bounded = twin.score_pages(*given, page_size=8, missing=missing, newest=torch.tensor([2]))
    assert torch.equal(bounded[..., :3], scores[..., :3])
    assert bounded[..., 3:].isneginf().all()


@pytest.mark.parametrize(("dim", "bits"), [(64, 2.25), (96, 2.0), (128, 2.5), (256, 1.0), (64, 0.25), (80, 0.5)])
def test_decoded_channels_are_the_reference_s(dim, bits):
    _, codes, _, _, levels = index(dim, bits)
    assert torch.equal(kernel.decode(codes, levels), reference.decode(codes, levels))


@pytest.mark.parametrize("n_queries", [1, 2])
@pytest.mark.parametrize("missing", [None, torch.tensor([0, 5, 41])])
@pytest.mark.parametrize(
    ("dim", "bits", "heads", "softcap"),
    [(64, 2.25, 4, None), (96, 2.0, 14, 2.0), (128, 0.5, 2, None), (80, 2.5, 8, None)],
)
@pytest.mark.parametrize("twin", [reference, kernel], ids=["reference", "triton"])
def test_attention_is_over_the_restored_keys_of_pages_that_are_left(
    twin, dim, bits, heads, softcap, missing, n_queries
):
    given = index(dim, bits, heads=heads)
    excluded = torch.rand(ROWS * n_queries, 13, generator=torch.Generator().manual_seed(5)) < 0.4
    excluded[0, :], excluded[-1, :] = True, False
    mean, lse = twin.attend_index(*given, excluded=excluded, page_size=8, missing=missing, softcap=softcap)
    logits, keys = definition(*given, missing, softcap)
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
    given, excluded = index(64, 2.25, n_tokens=200), torch.zeros(ROWS, 25, dtype=torch.bool)
    whole = kernel.attend_index(*given, excluded=excluded, page_size=8)
    monkeypatch.setattr(kernel, "_PROGRAMS", 1)
    assert_close(kernel.attend_index(*given, excluded=excluded, page_size=8), whole, atol=1e-4, rtol=1e-4)


def test_no_page_at_all_scores_nothing_and_is_empty():
    query, codes, *rest = index(64, 2.25)
    given = query, codes[:, :0], *rest
    assert kernel.score_pages(*given, page_size=8).shape == (ROWS, 4, 0)
    mean, lse = kernel.attend_index(*given, excluded=torch.zeros(ROWS, 0, dtype=torch.bool), page_size=8)
    assert not mean.any()
    assert lse.isneginf().all()
