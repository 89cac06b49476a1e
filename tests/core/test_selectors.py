"""Every selector of the union under the same contract, and each one's own estimate against its definition."""

from itertools import pairwise

import pytest
import torch
from heads import CPU, geometry, kinds, random_pages, random_query
from pydantic import ValidationError
from torch.testing import assert_close

from kvoffload.selection import SelectorConfig
from kvoffload.selection.anchored import AnchoredSelectorConfig
from kvoffload.selection.bounds import BoundsSelectorConfig
from kvoffload.selection.exact import ExactSelectorConfig
from kvoffload.selection.mean import MeanSelectorConfig
from kvoffload.selection.quantized import QuantizedSelectorConfig
from kvoffload.selection.spread import SpreadSelectorConfig
from kvoffload.selection.uniform import UniformSelectorConfig
from kvoffload.values import Pages

EVERY = kinds(SelectorConfig)


def built(config, shape, *runs, anchor=None):
    selector = config.build(shape, CPU)
    selector.reset(torch.zeros(shape.rows, shape.key_dim) if anchor is None else anchor)
    for pages in runs:
        selector.absorb(pages)
    return selector


def log_masses(query, pages):
    """log sum e^(q . k) over the tokens of each page that count, in fp64."""
    logits = torch.einsum("grd,gpsd->grps", query.double(), pages.keys.double())
    if pages.valid is not None:
        logits = logits.masked_fill(~pages.valid[:, None], -torch.inf)
    return logits.logsumexp(-1).float()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_every_page_has_a_score_for_every_query(kind, padded):
    shape = geometry()
    selector = built(kind(), shape, random_pages(shape, 19, padded=padded))
    scores = selector.score(random_query(shape))
    assert (scores.shape, scores.dtype) == ((2, 3, 19), torch.float32)
    assert not scores.isnan().any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_pages_absorbed_in_runs_equal_pages_absorbed_at_once(kind, padded):
    shape = geometry()
    pages, query, anchor = random_pages(shape, 50, padded=padded), random_query(shape), random_query(shape, 7)[:, 0]
    cuts = [0, 1, 2, 9, 16, 17, 33, 49, 50]
    runs = [pages.run(a, b) for a, b in pairwise(cuts)]
    at_once, in_runs = built(kind(), shape, pages, anchor=anchor), built(kind(), shape, *runs, anchor=anchor)
    assert_close(in_runs.score(query), at_once.score(query), atol=1e-5, rtol=1e-5)
    assert in_runs.index_bytes == at_once.index_bytes


@pytest.mark.parametrize("kind", EVERY)
def test_a_reset_forgets_every_page(kind):
    shape = geometry()
    pages, query = random_pages(shape, 20), random_query(shape)
    selector = built(kind(), shape, random_pages(shape, 33, padded=True, seed=5))
    selector.reset(torch.zeros(shape.rows, shape.key_dim))
    selector.absorb(pages)
    assert torch.equal(selector.score(query), built(kind(), shape, pages).score(query))


@pytest.mark.parametrize("kind", EVERY)
def test_absorbed_tensors_are_not_kept(kind):
    shape = geometry()
    pages, query = random_pages(shape, 20), random_query(shape)
    selector = built(kind(), shape, pages)
    before = selector.score(query).clone()
    pages.keys.fill_(float("nan"))
    assert torch.equal(selector.score(query), before)


@pytest.mark.parametrize("kind", EVERY)
def test_what_stands_at_padding_changes_no_score(kind):
    shape = geometry()
    pages, query = random_pages(shape, 20, padded=True), random_query(shape)
    wild = Pages(pages.keys.masked_fill(~pages.valid[..., None], 77.0), pages.values, pages.valid)
    given, expected = (built(kind(), shape, p).score(query) for p in (wild, pages))
    assert_close(given, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", EVERY)
def test_pages_of_padding_only_are_below_all_others(kind):
    shape = geometry()
    pages = random_pages(shape, 20, padded=True)
    pages.valid.view(shape.rows, -1)[0, :14] = False  # pages 0 to 2, and half of page 3
    scores = built(kind(), shape, pages).score(random_query(shape))
    assert (scores[0, :, :3].amax(-1) < scores[0, :, 3:].amin(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EVERY)
def test_the_planned_index_bytes_are_those_of_the_built_index(kind, dtype):
    shape = geometry()
    pages = random_pages(shape, 48)  # 192 tokens: whole groups of 64
    selector = built(kind(), shape, Pages(pages.keys.to(dtype), pages.values.to(dtype), None))
    planned = kind().index_bytes(192, shape.key_dim, shape.value_dim, shape.page_size, dtype.itemsize)
    assert selector.index_bytes == shape.rows * planned
    assert selector.resident_bytes >= selector.index_bytes


@pytest.mark.parametrize("kind", EVERY)
def test_only_the_token_oracle_reads_the_slow_tier(kind):
    assert kind.reads_slow_tier == (kind is ExactSelectorConfig)


@pytest.mark.parametrize("padded", [False, True])
def test_exact_is_the_true_log_mass(padded):
    shape = geometry()
    pages, query = random_pages(shape, 21, padded=padded), random_query(shape)
    assert_close(
        built(ExactSelectorConfig(), shape, pages).score(query), log_masses(query, pages), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("padded", [False, True])
def test_bounds_are_above_every_logit_of_the_page(padded):
    shape = geometry()
    pages, query = random_pages(shape, 21, padded=padded), random_query(shape)
    logits = torch.einsum("grd,gpsd->grps", query, pages.keys)
    if padded:
        logits = logits.masked_fill(~pages.valid[:, None], -torch.inf)
    assert (built(BoundsSelectorConfig(), shape, pages).score(query) >= logits.amax(-1) - 1e-5).all()


@pytest.mark.parametrize(
    "config", [BoundsSelectorConfig(), MeanSelectorConfig(), AnchoredSelectorConfig(), SpreadSelectorConfig()]
)
def test_summaries_are_exact_where_a_page_has_one_key(config):
    """One logit for all tokens: the largest is that one, the mass is the count times e to it."""
    shape = geometry()
    pages, query = random_pages(shape, 12, padded=True), random_query(shape)
    pages = Pages(pages.keys[:, :, :1].expand_as(pages.keys).clone(), pages.values, pages.valid)
    selector = built(config, shape, pages, anchor=random_query(shape, 4)[:, 0])
    expected = log_masses(query, pages) - (pages.counts().log()[:, None] if config.kind == "bounds" else 0.0)
    assert_close(selector.score(query)[:, :, 1:], expected[:, :, 1:], atol=1e-4, rtol=1e-4)


def test_mean_scores_the_mean_of_the_tokens_that_count():
    shape = geometry()
    pages, query = random_pages(shape, 9, padded=True), random_query(shape)
    scores = built(MeanSelectorConfig(), shape, pages).score(query)
    for row in range(2):
        for page in range(1, 9):
            keys = pages.keys[row, page][pages.valid[row, page]].double()
            expected = query[row].double() @ keys.mean(0) + torch.tensor(len(keys)).log()
            assert_close(scores[row, :, page], expected.float(), atol=1e-5, rtol=1e-5)


def test_anchored_is_the_true_log_mass_at_the_anchor():
    shape = geometry()
    pages, anchor = random_pages(shape, 21, padded=True), random_query(shape)[:, 0]
    selector = built(AnchoredSelectorConfig(), shape, pages, anchor=anchor)
    assert_close(selector.score(anchor[:, None]), log_masses(anchor[:, None], pages), atol=1e-5, rtol=1e-5)


def test_anchored_is_below_the_true_log_mass_elsewhere():
    """The first order of a convex function around the anchor."""
    shape = geometry()
    pages, query = random_pages(shape, 21), random_query(shape)
    selector = built(AnchoredSelectorConfig(), shape, pages, anchor=random_query(shape, 5)[:, 0])
    assert (selector.score(query) <= log_masses(query, pages) + 1e-4).all()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("n_pages", [3, 16, 37])  # less than a group, one group, two and a part
def test_quantized_is_within_half_a_step_of_the_true_log_mass(bits, n_pages):
    """A log-sum-exp moves at most as far as the largest change of its logits."""
    shape = geometry()
    pages, query = random_pages(shape, n_pages, padded=True), random_query(shape)
    scores = built(QuantizedSelectorConfig(bits=bits), shape, pages).score(query)
    steps = (pages.keys.flatten(1, 2).amax(1) - pages.keys.flatten(1, 2).amin(1)) / (4 if bits == 2 else 15)
    limit = (query.abs() * (steps / 2 + 0.005)[:, None]).sum(-1)  # 0.005: zero points and steps in fp16
    exact = log_masses(query, pages)
    assert torch.equal(scores.isneginf(), exact.isneginf())
    difference = (scores - exact).abs().nan_to_num(0.0)
    assert (difference <= limit[..., None]).all()


def test_quantized_with_more_bits_is_nearer_to_the_true_log_mass():
    shape = geometry()
    pages, query = random_pages(shape, 37), random_query(shape)
    one, two, four = (
        float(
            (built(QuantizedSelectorConfig(bits=b), shape, pages).score(query) - log_masses(query, pages)).abs().mean()
        )
        for b in (1, 2, 4)
    )
    assert one > two > 4 * four


def test_a_quantized_group_is_never_shorter_than_a_page():
    shape = geometry(page_size=32)
    selector = built(QuantizedSelectorConfig(group=8), shape, random_pages(shape, 3))
    assert selector.index_bytes == shape.rows * QuantizedSelectorConfig(group=8).index_bytes(96, 8, 16, 32, 4)
    assert selector.score(random_query(shape)).shape == (2, 3, 3)


def test_the_open_group_is_kept_beside_the_index():
    shape = geometry()
    selector = built(QuantizedSelectorConfig(), shape, random_pages(shape, 18))
    assert selector.resident_bytes - selector.index_bytes == shape.rows * 64 * shape.key_dim * 4


def test_a_group_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValidationError, match="group must be a power of two, not 48"):
        QuantizedSelectorConfig(group=48)


def test_a_head_that_does_not_fill_bytes_is_refused():
    with pytest.raises(ValueError, match="head size of 7 does not fill whole bytes at 2 bits"):
        QuantizedSelectorConfig().build(geometry(key_dim=7), CPU)


def test_spread_adds_pooled_deviations_to_the_mean():
    shape = geometry()
    pages, query = random_pages(shape, 9), random_query(shape)
    scores = built(SpreadSelectorConfig(deviations=3.0), shape, pages).score(query)
    keys = pages.keys.double()
    for row in range(2):
        centred = [page - page.mean(0) for page in keys[row]]
        scatter = sum(c.T @ c for c in centred)
        for head in range(3):
            q = query[row, head].double()
            shape_factor = q @ scatter @ q / scatter.trace()
            for page in range(9):
                size = centred[page].square().sum(-1).mean()
                expected = q @ keys[row, page].mean(0) + torch.tensor(4.0).log() + 3.0 * (size * shape_factor).sqrt()
                assert_close(scores[row, head, page], expected.float(), atol=1e-4, rtol=1e-4)


def test_uniform_does_not_look_at_the_query_or_the_keys():
    shape = geometry()
    selector = built(UniformSelectorConfig(), shape, random_pages(shape, 30))
    other = built(UniformSelectorConfig(), shape, random_pages(shape, 30, seed=3))
    assert torch.equal(selector.score(random_query(shape)), other.score(random_query(shape, 8)))


@pytest.mark.parametrize("k", [3, 10, 25])
def test_the_best_pages_of_uniform_are_spread_over_the_context(k):
    shape = geometry()
    scores = built(UniformSelectorConfig(), shape, random_pages(shape, 200)).score(random_query(shape))[0, 0]
    best = scores.topk(k).indices.sort().values
    gaps = torch.diff(torch.cat([torch.tensor([-1]), best, torch.tensor([200])]))
    assert gaps.max() <= 2.7 * 200 / k  # three-gap theorem: golden-ratio gaps differ by a factor 2.62 at most
