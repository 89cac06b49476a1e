"""Rival completions against plain loops over tokens, written from each paper's formula."""

import math

import pytest
import torch
from heads import CPU, all_pairs, fetch, geometry, masses, random_pages, random_query, softmax_over
from pydantic import ValidationError
from torch.testing import assert_close

from kvoffload.completion.centroids import CentroidsCompletionConfig
from kvoffload.completion.index_mass import IndexMassCompletionConfig
from kvoffload.completion.kmeans import spherical_k_means
from kvoffload.completion.mean_value import MeanValueCompletionConfig
from kvoffload.completion.moments import MomentsCompletionConfig
from kvoffload.completion.page_mean import PageMeanCompletionConfig
from kvoffload.completion.rank1 import Rank1CompletionConfig
from kvoffload.errors import UsageError
from kvoffload.values import Pages

READ = [(0, 3), (0, 4), (1, 0), (1, 8), (1, 9)]
ROWS_AND_HEADS = [(row, head) for row in range(2) for head in range(3)]
PADDED = pytest.mark.parametrize("padded", [False, True])


def built(config, shape, pages, anchor=None, run=1000):
    completion = config.build(shape, 0, CPU)
    completion.reset(torch.zeros(shape.rows, shape.key_dim) if anchor is None else anchor, n_pages=pages.n_pages)
    for start in range(0, pages.n_pages, run):
        completion.absorb(pages.run(start, min(start + run, pages.n_pages)))
    return completion


def estimate(completion, query, pages, read=READ, scores=None):
    return completion.estimate(query, fetch(pages, read), masses(query, pages) if scores is None else scores)


def tokens(pages, row, read=()):
    """Key and value, fp64, of each token of a row that counts and is on no page of ``read``."""
    for page in range(pages.n_pages):
        for i in range(pages.keys.shape[2]):
            if (row, page) not in read and (pages.valid is None or pages.valid[row, page, i]):
                yield pages.keys[row, page, i].double(), pages.values[row, page, i].double()


def same(rest, row, head, mass, numerator):
    """The partial of a row and head is that of these sums."""
    assert_close(rest.lse[row, head].double(), torch.as_tensor(mass).log(), atol=1e-4, rtol=1e-4)
    assert_close(rest.output[row, head].double(), numerator / mass, atol=1e-4, rtol=1e-4)


def noisy(scores):
    return scores + torch.randn(scores.shape, generator=torch.Generator().manual_seed(6))


def mean(vectors):
    return sum(vectors) / len(vectors)


@PADDED
def test_page_mean_is_count_and_means_of_every_unread_page(padded):
    shape = geometry()
    pages, query = random_pages(shape, 11, padded=padded), random_query(shape)
    rest = estimate(built(PageMeanCompletionConfig(), shape, pages, random_query(shape, 4)[:, 0]), query, pages)
    for row, head in ROWS_AND_HEADS:
        mass, numerator = 0.0, 0.0
        for page in {p for _, p in all_pairs(pages)} - {p for r, p in READ if r == row}:
            found = list(tokens(pages.run(page, page + 1), row))
            if found:
                term = len(found) * (query[row, head].double() @ mean([k for k, _ in found])).exp()
                mass, numerator = mass + term, numerator + term * mean([v for _, v in found])
        same(rest, row, head, mass, numerator)


@PADDED
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_rank1_gives_every_unread_token_its_prior_logit_and_one_bias(weight, padded):
    shape = geometry()
    pages, query, mu_q = random_pages(shape, 11, padded=padded), random_query(shape), random_query(shape, 4)[:, 0]
    rest = estimate(built(Rank1CompletionConfig(weight=weight), shape, pages, mu_q, run=3), query, pages)
    for row, head in ROWS_AND_HEADS:
        mu_k = mean([k for k, _ in tokens(pages, row)])
        bias = (query[row, head] - mu_q[row]).double() @ mu_k
        mass, numerator = 0.0, 0.0
        for key, value in tokens(pages, row, READ):
            term = weight * (mu_q[row].double() @ key + bias).exp()
            mass, numerator = mass + term, numerator + term * value
        same(rest, row, head, mass, numerator)


@PADDED
def test_mean_value_gives_the_unread_scores_to_the_mean_unread_value(padded):
    shape = geometry()
    pages, query = random_pages(shape, 11, padded=padded), random_query(shape)
    scores = noisy(masses(query, pages))
    rest = estimate(built(MeanValueCompletionConfig(), shape, pages, run=3), query, pages, scores=scores)
    for row, head in ROWS_AND_HEADS:
        mass = sum(scores[row, head, p].double().exp() for r, p in all_pairs(pages) if r == row and (r, p) not in READ)
        same(rest, row, head, mass, mass * mean([v for _, v in tokens(pages, row, READ)]))


@PADDED
def test_index_mass_weighs_segment_values_by_the_unread_scores(padded):
    shape = geometry()
    pages, query, anchor = random_pages(shape, 12, padded=padded), random_query(shape), random_query(shape, 4)[:, 0]
    scores = noisy(masses(query, pages))
    rest = estimate(built(IndexMassCompletionConfig(segments=3), shape, pages, anchor), query, pages, scores=scores)
    for row, head in ROWS_AND_HEADS:
        mass, numerator = 0.0, 0.0
        for first in (0, 4, 8):  # twelve pages in three segments
            segment = pages.run(first, first + 4)
            found = list(tokens(segment, row, [(r, p - first) for r, p in READ]))
            weights = [(anchor[row].double() @ k).exp() for k, _ in found]
            value = sum(w * v for w, (_, v) in zip(weights, found, strict=True)) / sum(weights)
            pages_left = [p for p in range(first, first + 4) if (row, p) not in READ]
            term = sum(scores[row, head, p].double().exp() for p in pages_left)
            mass, numerator = mass + term, numerator + term * value
        same(rest, row, head, mass, numerator)


def test_index_mass_keeps_the_mass_of_what_the_anchor_does_not_see():
    """A token far below the read ones under the anchor, and high for this query, keeps its score."""
    shape = geometry(group_size=1)
    pages = random_pages(shape, 2)
    pages.keys[:] = 0.0
    pages.keys[:, 0, :, 0], pages.keys[:, 1, :, 1] = 40.0, 5.0
    axes = torch.eye(8)
    completion = built(IndexMassCompletionConfig(segments=2), shape, random_pages(shape, 0), axes[0].expand(2, 8))
    completion.reset(axes[0].expand(2, 8), n_pages=4)  # two pages a segment
    completion.absorb(pages)
    query = axes[1].expand(2, 1, 8)
    rest = estimate(completion, query, pages, [(0, 0), (1, 0)])
    assert_close(rest.lse, torch.full((2, 1), 5.0 + math.log(4)))
    assert rest.output.isfinite().all()


def clusters_of(keys, directions, centre):
    return [max(range(len(directions)), key=lambda j, k=k: float((k - centre) @ directions[j])) for k in keys]


@PADDED
def test_k_means_is_rounds_of_largest_inner_product_and_unit_means(padded):
    shape, m = geometry(), 4
    pages = random_pages(shape, 10, padded=padded)
    keys, valid = pages.keys.flatten(1, 2), pages.log_valid().flatten(1).exp()
    found = spherical_k_means(keys, valid, m, iterations=4)
    for row in range(2):
        row_keys = [k for k, _ in tokens(pages, row)]
        centre, n = mean(row_keys), len(row_keys)
        directions = [row_keys[int((j + 0.5) * n / m)] - centre for j in range(m)]
        for _ in range(3):
            ids = clusters_of(row_keys, directions, centre)
            for j in set(ids):
                total = sum(k - centre for k, i in zip(row_keys, ids, strict=True) if i == j)
                directions[j] = total / total.norm()
        assert_close(found.directions[row].double(), torch.stack(directions), atol=1e-5, rtol=1e-5)
        assert found.of_keys(keys)[row][valid[row] > 0].tolist() == clusters_of(row_keys, directions, centre)


@PADDED
@pytest.mark.parametrize("fields", [{"tokens_per_cluster": 10}, {"clusters": 4}], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_centroids_weigh_the_unread_tokens_of_each_cluster(share, fields, padded):
    shape = geometry()
    pages, query = random_pages(shape, 10, padded=padded), random_query(shape)
    rest = estimate(built(CentroidsCompletionConfig(iterations=3, share=share, **fields), shape, pages), query, pages)
    keys, valid = pages.keys.flatten(1, 2), pages.log_valid().flatten(1).exp()
    found = spherical_k_means(keys, valid, 4, 3)
    for row in range(2):
        clusters = [[] for _ in range(4)]
        for key, value in tokens(pages, row, READ):
            [i] = clusters_of([key], found.directions[row].double(), found.centre[row, 0].double())
            clusters[i].append((key, value))
        terms = torch.zeros(3, 4, dtype=torch.float64)  # e^(q . c)
        for j, cluster in enumerate(clusters):
            if cluster:
                terms[:, j] = (query[row].double() @ mean([k for k, _ in cluster])).exp()
        order = (terms / terms.sum(-1, keepdim=True)).sum(0).argsort(descending=True)
        for head in range(3):
            kept = [j for j in order[: math.ceil(share * 4)].tolist() if clusters[j]]
            mass = sum(len(clusters[j]) * terms[head, j] for j in kept)
            same(rest, row, head, mass, sum(terms[head, j] * sum(v for _, v in clusters[j]) for j in kept))


@PADDED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", [1, 7, 40])
def test_fixed_clusters_keep_nothing_of_fetched_tokens_however_they_came(run, dtype, padded):
    shape, config = geometry(), CentroidsCompletionConfig(clusters=5)
    drawn, query = random_pages(shape, 40, padded=padded), random_query(shape)
    pages = Pages(drawn.keys.to(dtype), drawn.values.to(dtype), drawn.valid)
    completion = built(config, shape, pages, run=run)
    assert estimate(completion, query, pages, all_pairs(pages)).lse.isneginf().all()
    one_left = estimate(completion, query, pages, [pair for pair in all_pairs(pages) if pair != (0, 17)])
    expected = softmax_over(query, pages, [(0, 17)]).lse[0]
    assert one_left.lse[1].isneginf().all()
    assert (one_left.lse[0] <= expected + 1e-3).all()  # Jensen: a mean's mass is a lower bound
    assert (one_left.lse[0] > expected - 10).all()


def test_nothing_remains_of_fixed_clusters_even_if_a_fetched_key_looks_elsewhere():
    """Keys that come back changed may find other clusters; what was read is gone all the same."""
    shape = geometry()
    pages, query = random_pages(shape, 40), random_query(shape)
    completion = built(CentroidsCompletionConfig(clusters=5), shape, pages)
    changed = Pages(pages.keys + 0.3 * random_pages(shape, 40, seed=8).keys, pages.values, None)
    assert estimate(completion, query, changed, all_pairs(pages)).lse.isneginf().all()


def test_fixed_clusters_do_not_grow():
    shape, config = geometry(), CentroidsCompletionConfig(clusters=5)
    completion = built(config, shape, random_pages(shape, 30))
    assert completion.state_bytes == shape.rows * config.index_bytes(120, 8, 16, 4, 4)
    completion.absorb(random_pages(shape, 100))
    assert completion.state_bytes == shape.rows * config.index_bytes(520, 8, 16, 4, 4)


def test_a_row_that_begins_with_a_run_of_padding_finds_its_clusters_later():
    shape = geometry()
    drawn = random_pages(shape, 20)
    valid = torch.ones(2, 20, 4, dtype=torch.bool)
    valid[0, :10] = False
    pages = Pages(drawn.keys, drawn.values, valid)
    completion, query = built(CentroidsCompletionConfig(clusters=5), shape, pages, run=10), random_query(shape)
    alone = built(CentroidsCompletionConfig(clusters=5), shape, drawn.run(10, 20))
    none = torch.zeros(2, 3, 20)
    given, expected = (c.estimate(query, fetch(pages, []), none) for c in (completion, alone))
    assert_close(given.lse[0], expected.lse[0])
    assert_close(given.output[0], expected.output[0])


def test_more_clusters_than_two_bytes_tell_apart_are_refused(monkeypatch):
    monkeypatch.setattr("kvoffload.completion.centroids._MAX_CLUSTERS", 8)
    shape = geometry()
    completion = built(CentroidsCompletionConfig(tokens_per_cluster=4), shape, random_pages(shape, 8))
    with pytest.raises(UsageError, match=r"at most 8 clusters.*tokens_per_cluster=4"):
        completion.absorb(random_pages(shape, 1))


def cumulants(query, found):
    """n, mu, s^2, mean value and V-K covariance times q of these tokens."""
    logits = [query.double() @ k for k, _ in found]
    n, mu, value = len(found), mean(logits), mean([v for _, v in found])
    variance = sum((z - mu) ** 2 for z in logits) / n
    covariance = sum((z - mu) * (v - value) for z, (_, v) in zip(logits, found, strict=True)) / n
    return n, mu, variance, value, covariance


@PADDED
def test_moments_without_truncation_are_the_second_cumulant_of_the_unread_tokens(padded):
    shape = geometry()
    pages, query = random_pages(shape, 11, padded=padded), random_query(shape)
    rest = estimate(built(MomentsCompletionConfig(truncate=False), shape, pages, run=3), query, pages)
    for row, head in ROWS_AND_HEADS:
        n, mu, variance, value, covariance = cumulants(query[row, head], list(tokens(pages, row, READ)))
        mass = n * (mu + variance / 2).exp()
        same(rest, row, head, mass, mass * (value + covariance))


@PADDED
@pytest.mark.parametrize("page_size", [1, 4])
def test_moments_are_the_cumulant_of_all_tokens_cut_off_at_the_smallest_fetched(page_size, padded):
    shape = geometry(page_size=page_size)
    pages, query = random_pages(shape, 40 // page_size, padded=padded), random_query(shape)
    read = [(0, 8), (0, 9), (1, 0), (1, 7), (1, 9)]
    rest = estimate(built(MomentsCompletionConfig(), shape, pages, run=3), query, pages, read)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    for row, head in ROWS_AND_HEADS:
        n, mu, variance, value, covariance = cumulants(query[row, head], list(tokens(pages, row)))
        slices = [list(tokens(pages.run(p, p + 1), row)) for r, p in read if r == row]
        logits = [torch.stack([query[row, head].double() @ k for k, _ in s]).logsumexp(0) for s in slices if s]
        s = variance.sqrt()
        a = (min(logits) - mu - variance) / s
        mass = n * (mu + variance / 2).exp() * normal.cdf(a)
        mills = normal.log_prob(a).exp() / normal.cdf(a)
        same(rest, row, head, mass, mass * (value + covariance * (1 - mills / s)))


def test_moments_of_normal_logits_find_mass_and_output_behind_the_top_tokens():
    """Many normal keys and values that are linear in them: the law that the truncation assumes, at token level."""
    shape = geometry(page_size=1, group_size=1)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 4000, 1, 8, generator=generator)
    pages = Pages(keys, keys @ torch.randn(8, 16, generator=generator), None)
    query = random_query(shape)
    read = [(row, int(p)) for row in range(2) for p in masses(query, pages)[row, 0].topk(80).indices]
    rest = estimate(built(MomentsCompletionConfig(), shape, pages), query, pages, read)
    plain = estimate(built(MomentsCompletionConfig(truncate=False), shape, pages), query, pages, read)
    exact = softmax_over(query, pages, sorted(set(all_pairs(pages)) - set(read)))
    assert_close(rest.lse, exact.lse, atol=0.1, rtol=0)
    assert ((rest.output - exact.output).norm(dim=-1) < 0.1 * exact.output.norm(dim=-1)).all()
    assert ((plain.lse - exact.lse).abs() > (rest.lse - exact.lse).abs()).all()


def test_moments_of_equal_or_far_away_keys_stay_finite():
    shape = geometry()
    drawn, query = random_pages(shape, 11), random_query(shape)
    equal = Pages(drawn.keys[:, :1, :1].expand_as(drawn.keys).clone(), drawn.values, None)
    far = Pages(drawn.keys * 30, drawn.values, None)
    for pages in (equal, far):
        rest = estimate(built(MomentsCompletionConfig(), shape, pages), query, pages)
        assert rest.lse.isfinite().all()
        assert rest.output.isfinite().all()


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (CentroidsCompletionConfig, {"share": 0.0}),
        (CentroidsCompletionConfig, {"clusters": 0}),
        (Rank1CompletionConfig, {"weight": -1.0}),
        (IndexMassCompletionConfig, {"segments": 1}),
    ],
)
def test_sizes_that_make_no_sense_are_refused(config, fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        config(**fields)
