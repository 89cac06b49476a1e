"""Token-level indexes under one contract, and when the transform-coded one is fitted."""

import pytest
import torch
from heads import CPU, ExactIndex, geometry, random_pages, random_query
from torch.testing import assert_close

from kvoffload.index.quantized import QuantizedIndex
from kvoffload.index.transform import FIT_TOKENS, TransformIndex
from kvoffload.values import KeySample, Pages

MAKERS = {
    "exact": ExactIndex,
    "quantized": lambda: QuantizedIndex(4, 16, CPU),
    "transform": lambda: TransformIndex(2.5, 8, CPU),
}


def filled(name, *runs, sample=None):
    index = MAKERS[name]()
    index.reset(sample)
    for pages in runs:
        index.absorb(pages)
    return index


def sample_of(pages):
    return KeySample(pages.keys.flatten(1, 2))


@pytest.mark.parametrize("n_pages", [5, 200])
@pytest.mark.parametrize("name", MAKERS)
def test_logits_are_those_of_the_restored_keys(name, n_pages):
    shape = geometry()
    pages, query = random_pages(shape, n_pages), random_query(shape)
    index = filled(name, pages)
    assert index.n_tokens == 4 * n_pages
    assert_close(index.logits(query), query @ index.keys(0, index.n_tokens).mT, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n_pages", [5, 200])
@pytest.mark.parametrize("name", MAKERS)
def test_a_run_of_keys_is_a_part_of_all_keys(name, n_pages):
    index = filled(name, random_pages(geometry(), n_pages))
    every = index.keys(0, index.n_tokens)
    assert_close(index.keys(3, index.n_tokens - 2), every[:, 3:-2])


@pytest.mark.parametrize("name", MAKERS)
def test_padding_has_no_logit(name):
    pages = random_pages(geometry(), 200, padded=True)
    logits = filled(name, pages).logits(random_query(geometry()))
    assert torch.equal(logits.isneginf(), ~pages.valid.flatten(1)[:, None].expand_as(logits))


def test_without_a_sample_keys_stay_exact_until_there_are_enough_to_fit():
    shape = geometry()
    pages = random_pages(shape, FIT_TOKENS // 4 + 10)
    few = FIT_TOKENS // 4 - 1
    index = filled("transform", pages.run(0, few))
    assert torch.equal(index.keys(0, index.n_tokens), pages.keys.flatten(1, 2)[:, : index.n_tokens])
    index.absorb(pages.run(few, pages.n_pages))
    assert not torch.equal(index.keys(0, index.n_tokens), pages.keys.flatten(1, 2))
    in_one = filled("transform", pages)
    assert_close(in_one.keys(0, in_one.n_tokens), index.keys(0, index.n_tokens))


def test_a_sample_of_too_few_keys_are_not_fitted_to():
    pages = random_pages(geometry(), 10)
    index = filled("transform", pages, sample=sample_of(pages))
    assert torch.equal(index.keys(0, 40), pages.keys.flatten(1, 2))


def test_with_a_sample_the_first_page_is_coded_already():
    pages = random_pages(geometry(), 200)
    index = filled("transform", pages.run(0, 1), sample=sample_of(pages))
    assert not torch.equal(index.keys(0, 4), pages.keys[:, 0])
    assert index.index_bytes < index.resident_bytes


def test_what_stands_at_padding_does_not_move_the_fit():
    pages = random_pages(geometry(), 200, padded=True)
    wild = Pages(pages.keys.masked_fill(~pages.valid[..., None], 77.0), pages.values, pages.valid)
    given, expected = (filled("transform", p).keys(8, 800) for p in (wild, pages))
    assert_close(given, expected)


def test_moments_are_those_of_the_keys_that_count():
    pages = random_pages(geometry(), 100, padded=True)
    keys, valid = pages.keys.flatten(1, 2), pages.valid.flatten(1)
    mean, covariance = KeySample(keys, valid).moments()
    for row in range(2):
        real = keys[row, valid[row]]
        assert_close(mean[row], real.mean(0))
        assert_close(covariance[row], real.T.cov(correction=0))


@pytest.mark.parametrize("name", MAKERS)
def test_logits_that_were_scored_are_handed_on_once_and_to_their_own_queries_only(name):
    shape = geometry()
    pages, query, other = random_pages(shape, 200), random_query(shape), random_query(shape, 9)
    index = filled(name, pages)
    index.hands_on = True
    scored = index.score(query)
    assert index.logits_again(query) is scored
    again = index.logits_again(query)
    assert again is not scored
    assert torch.equal(again, scored)
    index.score(query)
    assert torch.equal(index.logits_again(other), index.logits(other))


def test_logits_scored_before_a_page_came_are_not_handed_on():
    shape = geometry()
    pages, query = random_pages(shape, 200), random_query(shape)
    index = filled("quantized", pages.run(0, 199))
    index.hands_on = True
    index.score(query)
    index.absorb(pages.run(199, 200))
    assert index.logits_again(query).shape[-1] == 800


@pytest.mark.parametrize("n_pages", [5, 200])
@pytest.mark.parametrize("hands_on", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_weighing_gives_the_mean_of_the_restored_keys(name, n_pages, hands_on):
    shape = geometry()
    pages, query = random_pages(shape, n_pages), random_query(shape)
    index = filled(name, pages)
    index.hands_on = hands_on
    logits = index.score(query).clone()
    logits[:, :, ::3] = -torch.inf
    for _ in range(2):  # what was kept from scoring is gone the second time
        given = index.weigh(logits)
        assert_close(given.lse, logits.logsumexp(-1))
        assert_close(given.output, logits.softmax(-1) @ index.keys(0, index.n_tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("n_pages", [5, 200])
@pytest.mark.parametrize("name", MAKERS)
def test_attention_is_over_the_pages_that_are_not_excluded_and_no_padding(name, n_pages, softcap):
    shape = geometry()
    pages, query = random_pages(shape, n_pages, padded=True), random_query(shape)
    index = filled(name, pages)
    excluded = torch.rand(shape.rows, n_pages, generator=torch.Generator().manual_seed(2)) < 0.4
    logits = query @ index.keys(0, index.n_tokens).mT
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    gone = excluded.repeat_interleave(4, 1) | ~pages.valid.flatten(1)
    logits = logits.masked_fill(gone[:, None], -torch.inf)
    given = index.attend(query, excluded, 4, softcap)
    assert_close(given.lse, logits.logsumexp(-1), atol=1e-4, rtol=1e-4)
    assert_close(given.output, logits.softmax(-1) @ index.keys(0, index.n_tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n_pages", [5, 200])
@pytest.mark.parametrize("name", MAKERS)
def test_a_page_scores_the_mass_of_its_tokens(name, n_pages):
    shape = geometry()
    pages, query = random_pages(shape, n_pages, padded=True), random_query(shape)
    index = filled(name, pages)
    given = index.score_pages(query, 4)
    assert_close(given, index.logits(query).unflatten(-1, (-1, 4)).logsumexp(-1))
