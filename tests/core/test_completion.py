"""Completions against analytic oracles: keys that satisfy an estimator's model give its exact partial."""

import pytest
import torch
from heads import CPU, all_pairs, fetch, geometry, indexed, kinds, masses, random_pages, random_query, softmax_over
from torch.testing import assert_close

from kvoffload.completion import CompletionConfig
from kvoffload.completion.anchored import AnchoredCompletionConfig
from kvoffload.completion.centroids import CentroidsCompletionConfig
from kvoffload.completion.exact import ExactCompletionConfig
from kvoffload.completion.gated import ABSTAIN, GatedCompletion
from kvoffload.completion.index_mass import IndexMassCompletionConfig
from kvoffload.completion.mean_value import MeanValueCompletionConfig
from kvoffload.completion.moments import MomentsCompletionConfig
from kvoffload.completion.none import NoCompletionConfig
from kvoffload.completion.page_mean import PageMeanCompletionConfig
from kvoffload.completion.pages import PagesCompletionConfig
from kvoffload.completion.phi import PhiCompletionConfig
from kvoffload.completion.rank1 import Rank1CompletionConfig
from kvoffload.values import Pages, Partial, merge

EVERY = kinds(CompletionConfig)
SUMMARIES = [kind for kind in EVERY if kind not in (NoCompletionConfig, CentroidsCompletionConfig)]  # clustered by run
FIXED_SIZE = [
    AnchoredCompletionConfig,
    IndexMassCompletionConfig,
    MeanValueCompletionConfig,
    MomentsCompletionConfig,
    PhiCompletionConfig,
    Rank1CompletionConfig,
]
FIRST_ORDER = [
    AnchoredCompletionConfig,
    CentroidsCompletionConfig,
    ExactCompletionConfig,
    IndexMassCompletionConfig,
    MeanValueCompletionConfig,
    PageMeanCompletionConfig,
    PagesCompletionConfig,
    Rank1CompletionConfig,
]


def built(kind, shape, pages, *, anchor=None, n_pages=None):
    completion = indexed(kind().build(shape, 0, CPU))
    anchor = torch.zeros(shape.rows, shape.key_dim) if anchor is None else anchor
    completion.reset(anchor, n_pages=pages.n_pages if n_pages is None else n_pages)
    completion.absorb(pages)
    return completion


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_nothing_remains_when_everything_was_fetched(kind, padded):
    shape = geometry()
    pages, query = random_pages(shape, 37, padded=padded), random_query(shape)
    completion = built(kind, shape, pages, anchor=torch.randn(shape.rows, shape.key_dim))
    rest = completion.estimate(query, fetch(pages, all_pairs(pages)), masses(query, pages))
    assert rest.lse.isneginf().all()
    assert not rest.output.isnan().any()


@pytest.mark.parametrize("kind", EVERY)
def test_an_empty_remainder_leaves_the_merge_bit_identical(kind):
    shape = geometry()
    pages, query = random_pages(shape, 9), random_query(shape)
    read = fetch(pages, all_pairs(pages))
    rest = built(kind, shape, pages).estimate(query, read, masses(query, pages))
    exact = softmax_over(query, pages, all_pairs(pages))
    merged = merge([exact, rest])
    assert torch.equal(merged.output, exact.output)
    assert torch.equal(merged.lse, exact.lse)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", FIRST_ORDER)
def test_duplicated_keys_give_the_exact_remainder(kind, padded):
    """All tokens of a row share one key: every first-order summary is then exact, for any anchor and query."""
    shape = geometry()
    pages = random_pages(shape, 21, padded=padded)
    pages = Pages(pages.keys[:, :1, :1].expand_as(pages.keys).clone(), pages.values, pages.valid)
    query, read = random_query(shape), [(0, 3), (0, 4), (1, 20)]
    completion = built(kind, shape, pages, anchor=random_query(shape, 5)[:, 0])
    rest = completion.estimate(query, fetch(pages, read), masses(query, pages))
    expected = softmax_over(query, pages, sorted(set(all_pairs(pages)) - set(read)))
    assert_close(rest.lse, expected.lse, atol=1e-4, rtol=1e-5)
    assert_close(rest.output, expected.output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [AnchoredCompletionConfig, PagesCompletionConfig])
def test_tilted_sums_are_exact_at_the_anchor(kind):
    """At q = q0 the first-order term vanishes, so mass and mean value are exact for arbitrary keys."""
    shape = geometry(group_size=1)
    pages = random_pages(shape, 40, padded=True)
    anchor = random_query(shape)[:, 0]
    read = [(0, 2), (0, 39), (1, 7)]
    completion, query = built(kind, shape, pages, anchor=anchor), anchor[:, None]
    rest = completion.estimate(query, fetch(pages, read), masses(query, pages))
    expected = softmax_over(anchor[:, None], pages, sorted(set(all_pairs(pages)) - set(read)))
    assert_close(rest.lse, expected.lse, atol=1e-4, rtol=1e-5)
    assert_close(rest.output, expected.output, atol=1e-4, rtol=1e-4)


def test_the_exact_completion_equals_softmax_over_the_remainder():
    shape = geometry()
    pages, query, read = random_pages(shape, 11, padded=True), random_query(shape), [(0, 0), (1, 5), (1, 6)]
    rest = built(ExactCompletionConfig, shape, pages).estimate(query, fetch(pages, read), masses(query, pages))
    expected = softmax_over(query, pages, sorted(set(all_pairs(pages)) - set(read)))
    assert_close(rest.lse, expected.lse, atol=1e-5, rtol=1e-5)
    assert_close(rest.output, expected.output, atol=1e-5, rtol=1e-5)


def test_dropping_the_remainder_errs_by_the_dropped_mass():
    """o_S - o = delta (o_S - o_R), and the total variation is delta."""
    shape = geometry()
    pages, query, read = random_pages(shape, 11), random_query(shape), [(0, 0), (1, 5), (1, 6)]
    rest = sorted(set(all_pairs(pages)) - set(read))
    kept, left, dense = (softmax_over(query, pages, pairs) for pairs in (read, rest, all_pairs(pages)))
    nothing = built(NoCompletionConfig, shape, pages).estimate(query, fetch(pages, read), masses(query, pages))
    plain = merge([kept, nothing])
    dropped = (left.lse - dense.lse).exp()[..., None]
    assert_close(plain.output - dense.output, dropped * (kept.output - left.output), atol=1e-5, rtol=1e-4)


def test_random_features_estimate_the_exponential_kernel_without_bias():
    """FAVOR+ is unbiased: the mean over many features comes close to e^(q . k) for small norms."""
    shape = geometry(group_size=1)
    pages = random_pages(shape, 2)
    pages = Pages(pages.keys * 0.3, pages.values, None)
    query = random_query(shape) * 0.3
    completion = PhiCompletionConfig(features=65536).build(shape, 0, CPU)
    completion.reset(random_query(shape, 9)[:, 0] * 0.3)
    completion.absorb(pages)
    rest = completion.estimate(query, fetch(pages, []), masses(query, pages))
    assert_close(rest.lse, softmax_over(query, pages, all_pairs(pages)).lse, atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", FIXED_SIZE)
def test_fixed_size_state_does_not_grow(kind):
    shape = geometry()
    completion = built(kind, shape, random_pages(shape, 3))
    before = completion.state_bytes
    for seed in range(50):
        completion.absorb(random_pages(shape, 7, seed=seed))
    assert completion.state_bytes == before > 0


@pytest.mark.parametrize("kind", SUMMARIES)
def test_pages_absorbed_one_by_one_equal_pages_absorbed_at_once(kind):
    shape = geometry()
    pages, query = random_pages(shape, 50, padded=True), random_query(shape)
    at_once = built(kind, shape, pages)
    one_by_one = built(kind, shape, pages.run(0, 1), n_pages=50)
    for page in range(1, 50):
        one_by_one.absorb(pages.run(page, page + 1))
    read = fetch(pages, [(0, 0), (0, 1), (0, 49), (1, 30)])
    a, b = (completion.estimate(query, read, masses(query, pages)) for completion in (at_once, one_by_one))
    assert_close(a.lse, b.lse, atol=1e-4, rtol=1e-4)
    assert_close(a.output, b.output, atol=1e-4, rtol=1e-4)


def test_segments_merge_while_the_context_grows_and_stay_exact_at_the_anchor():
    shape = geometry(group_size=1)
    anchor = random_query(shape)[:, 0]
    pages = random_pages(shape, 200)
    completion = AnchoredCompletionConfig(segments=8).build(shape, 0, CPU)
    completion.reset(anchor, n_pages=16)
    for start in range(0, 200, 3):
        completion.absorb(pages.run(start, min(start + 3, 200)))
    read = [(0, 0), (0, 199), (1, 55)]
    rest = completion.estimate(anchor[:, None], fetch(pages, read), masses(anchor[:, None], pages))
    expected = softmax_over(anchor[:, None], pages, sorted(set(all_pairs(pages)) - set(read)))
    assert_close(rest.lse, expected.lse, atol=1e-4, rtol=1e-5)
    assert_close(rest.output, expected.output, atol=1e-4, rtol=1e-4)


def test_a_gate_that_abstains_is_plain_top_k_bit_for_bit():
    shape = geometry()
    pages, query, read = random_pages(shape, 20), random_query(shape), [(0, 0), (1, 5), (1, 6)]
    gate = GatedCompletion([PagesCompletionConfig().build(shape, 0, CPU)], shape.value_dim)
    gate.reset(torch.zeros(shape.rows, shape.key_dim))
    gate.absorb(pages)
    gate.choice = torch.tensor([[ABSTAIN, 1, ABSTAIN], [1, ABSTAIN, 1]])
    kept = softmax_over(query, pages, read)
    alone = built(PagesCompletionConfig, shape, pages)
    merged, alone = (merge([kept, c.estimate(query, fetch(pages, read), masses(query, pages))]) for c in (gate, alone))
    abstains = gate.choice == ABSTAIN
    assert torch.equal(merged.output[abstains], kept.output[abstains])
    assert torch.equal(merged.output[~abstains], alone.output[~abstains])


def test_merging_in_any_order_gives_the_softmax_over_the_union():
    shape = geometry()
    pages, query = random_pages(shape, 12), random_query(shape)
    pairs = all_pairs(pages)
    parts = [softmax_over(query, pages, pairs[i::3]) for i in range(3)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        merged = merge([parts[i] for i in order])
        assert_close(merged.output, softmax_over(query, pages, pairs).output, atol=1e-5, rtol=1e-5)
    empty = Partial.empty(query, shape.value_dim)
    assert merge([empty, empty]).lse.isneginf().all()
    assert not merge([empty, empty]).output.any()
