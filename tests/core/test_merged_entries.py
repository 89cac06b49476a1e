"""KeepKV's and Chelsea's entries against their definitions."""

import pytest
import torch
from heads import CPU, fetch, geometry, masses, random_pages, random_query, softmax_over
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from kvoffload.completion import keepkv
from kvoffload.completion.chelsea import ChelseaCompletionConfig, soft_matching
from kvoffload.completion.keepkv import KeepkvCompletionConfig, assign, zip_merge
from kvoffload.completion.phi import PhiCompletionConfig
from kvoffload.values import Pages, merge

SHAPE = geometry(page_size=8)


def built(config, pages, anchor=None):
    completion = config.build(SHAPE, 0, CPU)
    completion.reset(torch.zeros(SHAPE.rows, SHAPE.key_dim) if anchor is None else anchor)
    completion.absorb(pages)
    return completion


def everything(completion, query, pages):
    return completion.estimate(query, fetch(pages, []), masses(query, pages))


def exact(query, pages):
    return softmax_over(query, pages, [(r, p) for r in range(SHAPE.rows) for p in range(pages.n_pages)])


def pair(cosine=0.95, seed=0):
    """Two tokens whose keys have this cosine, values, a merge query and its logits; one page of one row."""
    generator = torch.Generator().manual_seed(seed)
    d = 16
    first, other, query = (torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0) for _ in range(3))
    other = torch.nn.functional.normalize(other - (other @ first) * first, dim=0)
    keys = 3 * torch.stack([first, cosine * first + (1 - cosine**2) ** 0.5 * other])
    query = 2 * torch.nn.functional.normalize(first + 0.5 * query, dim=0)
    return keys[None], torch.randn(1, 2, d, generator=generator), query


def merged_pair(keys, values, query):
    groups = torch.ones(1, 1, 2, dtype=torch.bool)
    return zip_merge(keys, values, (keys @ query), groups)


def output(keys, values, log_weights, query, rest):
    """Attention to entries and the other keys and values ``rest``."""
    logits = torch.cat([keys @ query + log_weights, rest[0] @ query])
    return logits.softmax(0) @ torch.cat([values, rest[1]])


def test_a_merge_is_exact_for_the_query_that_it_was_made_with():
    n_exact = 0
    for seed in range(50):
        keys, values, query = pair(seed=seed)
        entry, n_clamped = merged_pair(keys, values, query)
        if n_clamped:
            continue
        n_exact += 1
        rest = torch.randn(20, 16, generator=torch.Generator().manual_seed(seed + 99)), torch.ones(20, 16)
        given = output(entry.keys[0], entry.values[0], entry.log_weights[0], query, rest)
        assert_close(given, output(keys[0], values[0], torch.zeros(2), query, rest), atol=1e-5, rtol=1e-5)
    assert n_exact > 40


def test_an_identical_pair_has_two_votes_and_no_error_for_any_query():
    keys, values, query = pair(cosine=1.0)
    values = values[:, :1].expand(-1, 2, -1)
    entry, n_clamped = merged_pair(keys, values, query)
    assert n_clamped == 0
    assert_close(entry.log_weights.exp(), torch.tensor([[2.0]]))
    for seed in range(10):
        other = torch.randn(16, generator=torch.Generator().manual_seed(seed))
        rest = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)), torch.ones(5, 16)
        given = output(entry.keys[0], entry.values[0], entry.log_weights[0], other, rest)
        assert_close(given, output(keys[0], values[0], torch.zeros(2), other, rest), atol=1e-5, rtol=1e-5)


def test_a_convex_merge_without_votes_sags_and_votes_end_that(monkeypatch):
    """An entry with the convex key, which stands wherever the exact one would explode; here it stands always."""
    monkeypatch.setattr(keepkv, "_FACTORS", (torch.inf, torch.inf))
    for seed in range(20):
        keys, values, query = pair(seed=seed)
        entry, n_clamped = merged_pair(keys, values, query)
        assert n_clamped == 1
        mass, without_votes = (keys[0] @ query).exp().sum(), (entry.keys[0, 0] @ query).exp()
        assert without_votes < mass
        assert 0.9 * mass < without_votes * entry.log_weights[0, 0].exp() < 1.1 * mass


def test_errors_are_ordered_under_drift():
    """Zero-perturbation merging at most votes with a convex key, below convex merging and eviction."""
    errors = {name: [] for name in ("zip", "votes", "convex", "evict")}
    for seed in range(200):
        keys, values, query = pair(seed=seed)
        entry, _ = merged_pair(keys, values, query)
        shares = (keys[0] @ query).softmax(0)
        convex, value = shares @ keys[0], shares @ values[0]
        generator = torch.Generator().manual_seed(seed + 7)
        drifted = query + 0.05 * torch.randn(16, generator=generator)
        rest = torch.randn(10, 16, generator=generator), torch.randn(10, 16, generator=generator)
        truth = output(keys[0], values[0], torch.zeros(2), drifted, rest)
        tried = {
            "zip": (entry.keys[0], entry.values[0], entry.log_weights[0]),
            "votes": (convex[None], value[None], torch.tensor([2.0]).log()),
            "convex": (convex[None], value[None], torch.zeros(1)),
            "evict": (keys[0, :1], values[0, :1], torch.zeros(1)),
        }
        for name, stored in tried.items():
            errors[name].append(float((output(*stored, drifted, rest) - truth).norm()))
    median = {name: sorted(found)[100] for name, found in errors.items()}
    assert median["zip"] <= median["votes"] < min(median["convex"], median["evict"])


def test_votes_are_conserved():
    pages = random_pages(SHAPE, 20)
    completion = built(KeepkvCompletionConfig(threshold=-1), pages)
    assert_close(completion._log_weights.view.exp().sum(-1), torch.full((2, 20), 8.0))
    strict = built(KeepkvCompletionConfig(threshold=1), pages)
    assert_close(strict._log_weights.view.exp(), torch.ones(2, 20, 2))


def test_tokens_join_the_kept_key_most_like_them():
    keys = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [0.1, 0.9], [-1, 0]])
    groups = assign(keys, torch.tensor([0, 1]), 0.8)
    assert groups.tolist() == [[True, False, True, False, False], [False, True, False, True, False]]


def test_a_key_that_would_explode_is_the_convex_one_and_counted():
    keys, groups = torch.tensor([[[1.0, 0], [-2.0, 0]]]), torch.ones(1, 1, 2).bool()
    entry, n_clamped = zip_merge(keys, torch.ones(1, 2, 2), torch.tensor([[0.5, -1.0]]), groups)
    assert n_clamped == 1
    shares = torch.tensor([0.5, -1.0]).softmax(0)
    assert_close(entry.keys[0, 0], shares @ keys[0])
    assert_close(entry.log_weights.exp(), torch.tensor([[2.0]]))


def test_a_keepkv_page_is_exact_at_its_anchor_where_nothing_is_clamped():
    anchor = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    pages = random_pages(SHAPE, 6)
    keys = anchor[:, None, None] * 0.5 + 0.1 * pages.keys
    pages = Pages(keys, pages.values, None)
    completion = built(KeepkvCompletionConfig(threshold=-1), pages, anchor)
    assert completion.n_clamped == 0
    query = anchor[:, None].expand(-1, 3, -1)
    given, expected = everything(completion, query, pages), exact(query, pages)
    assert_close(given.lse, expected.lse, atol=1e-4, rtol=1e-4)
    assert_close(given.output, expected.output, atol=1e-4, rtol=1e-4)


def test_duplicate_keys_are_exact_centroids():
    pages = random_pages(SHAPE, 10)
    twice = Pages(*(t[:, :, ::4].repeat_interleave(4, 2) for t in (pages.keys, pages.values)), None)
    query = random_query(SHAPE)
    given, expected = everything(built(ChelseaCompletionConfig(), twice), query, twice), exact(query, twice)
    assert_close(given.lse, expected.lse, atol=1e-5, rtol=1e-5)
    assert_close(given.output, expected.output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("centroids", [1, 2, 3, 7])
def test_the_mass_of_centroids_never_exceeds_the_true_one(centroids, padded):
    pages = random_pages(SHAPE, 12, padded=padded)
    completion = built(ChelseaCompletionConfig(centroids=centroids), pages)
    for seed in range(20):
        query = random_query(SHAPE, seed)
        assert (everything(completion, query, pages).lse <= exact(query, pages).lse + 1e-5).all()


def test_sizes_are_conserved_and_weigh():
    pages = random_pages(SHAPE, 12)
    completion = built(ChelseaCompletionConfig(), pages)
    assert_close(completion._log_weights.view.exp().sum(-1), torch.full((2, 12), 8.0))
    query = random_query(SHAPE)
    truth, given = exact(query, pages).lse, everything(completion, query, pages).lse
    completion._log_weights._data.zero_()
    without = everything(completion, query, pages).lse
    assert ((given - truth).abs() < (without - truth).abs()).all()


def test_the_strongest_links_are_merged_first():
    keys = torch.tensor([[1.0, 0], [1.0, 0.01], [0, 1.0], [-1.0, 0]])
    sums = torch.cat([torch.ones(4, 1), keys, torch.zeros(4, 1)], 1)[None]
    left = soft_matching(sums, 3, 2)[0]
    assert left[:, 0].tolist() == [2, 1, 1]
    assert_close(left[0, 1:3] / 2, torch.tensor([1.0, 0.005]))
    assert_close(left[1:, 1:3], keys[2:])


def test_matching_costs_are_linear_in_the_tokens():
    """Chunks do not meet: the products of four times the pages are four times as many."""

    def flops(n_pages):
        pages = random_pages(geometry(page_size=16), n_pages)
        sums = torch.cat([torch.ones(*pages.keys.shape[:3], 1), pages.keys], -1).flatten(0, 1)
        with FlopCounterMode(display=False) as counter:
            soft_matching(sums, 2, 8)
        return counter.get_total_flops()

    assert flops(2000) == 4 * flops(500) > 0


def test_a_rare_token_is_lost_in_a_centroid_and_found_by_reading():
    pages, query = random_pages(SHAPE, 30), random_query(SHAPE)
    pages.keys[:, 11, 3] = 2.5 * query.mean(1) + 2.0 * torch.nn.functional.normalize(query.mean(1), dim=-1)
    completion = built(ChelseaCompletionConfig(centroids=1), pages)
    truth = exact(query, pages)
    lost = everything(completion, query, pages)
    read = [(0, 11), (1, 11)]
    found = merge(
        [softmax_over(query, pages, read), completion.estimate(query, fetch(pages, read), masses(query, pages))]
    )
    assert (found.output - truth.output).norm() < 0.5 * (lost.output - truth.output).norm()


@pytest.mark.parametrize("sharpness", [0.3, 1.0], ids=["high entropy", "low entropy"])
def test_centroids_err_less_than_random_feature_maps_of_equal_bytes(sharpness):
    pages = random_pages(SHAPE, 32)
    chelsea = built(ChelseaCompletionConfig(centroids=1), pages)
    phi = built(PhiCompletionConfig(features=48), pages)
    assert chelsea.state_bytes <= phi.state_bytes <= 1.1 * chelsea.state_bytes
    errors = {chelsea: 0.0, phi: 0.0}
    for seed in range(10):
        query = sharpness * random_query(SHAPE, seed)
        for completion in errors:
            off = everything(completion, query, pages).output - exact(query, pages).output
            errors[completion] += float(off.norm())
    assert errors[chelsea] < errors[phi]
