"""What every completion of the union promises beside its estimate: its bytes, its empty state, its independence."""

import pytest
import torch
from heads import CPU, all_pairs, fetch, geometry, indexed, kinds, masses, random_pages, random_query
from torch.testing import assert_close

from kvoffload.completion import CompletionConfig
from kvoffload.completion.anchored import AnchoredCompletionConfig
from kvoffload.completion.exact import ExactCompletionConfig
from kvoffload.completion.gated import GatedCompletion
from kvoffload.completion.none import NoCompletionConfig
from kvoffload.completion.pages import PagesCompletionConfig
from kvoffload.completion.phi import PhiCompletionConfig
from kvoffload.completion.regression import RegressionCompletionConfig
from kvoffload.completion.sketch import SketchCompletionConfig
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial, merge

EVERY = kinds(CompletionConfig)


def built(config, shape, *runs, n_pages=0):
    completion = indexed(config.build(shape, 0, CPU))
    completion.reset(torch.zeros(shape.rows, shape.key_dim), n_pages=n_pages)
    for pages in runs:
        completion.absorb(pages)
    return completion


def estimate(completion, query, pages, read):
    """With a perfect selector's scores, and the (row, page) pairs of ``read`` fetched."""
    return completion.estimate(query, fetch(pages, read), masses(query, pages))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EVERY)
def test_the_planned_bytes_are_those_of_the_built_state(kind, dtype):
    shape = geometry()
    pages = random_pages(shape, 32)
    completion = built(kind(), shape, Pages(pages.keys.to(dtype), pages.values.to(dtype), None), n_pages=32)
    planned = kind().index_bytes(128, shape.key_dim, shape.value_dim, shape.page_size, dtype.itemsize)
    assert completion.state_bytes == shape.rows * planned


@pytest.mark.parametrize("n_pages", [32, 600])
@pytest.mark.parametrize("kind", [RegressionCompletionConfig, SketchCompletionConfig])
def test_what_a_fit_is_made_from_is_planned_too(kind, n_pages):
    shape = geometry()
    completion = built(kind(), shape, random_pages(shape, n_pages), n_pages=n_pages)
    planned = kind().resident_bytes(4 * n_pages, shape.key_dim, shape.value_dim, shape.page_size, 4)
    assert completion.resident_bytes == shape.rows * planned


@pytest.mark.parametrize("kind", EVERY)
def test_without_pages_there_is_no_remainder(kind):
    shape = geometry()
    none = random_pages(shape, 3).run(0, 0)
    rest = estimate(built(kind(), shape), random_query(shape), none, [])
    assert (rest.output.shape, rest.lse.shape) == ((2, 3, 16), (2, 3))
    assert rest.lse.isneginf().all()
    assert not rest.output.any()


@pytest.mark.parametrize("kind", EVERY)
def test_an_estimate_changes_nothing_in_the_state(kind):
    shape = geometry()
    pages, query = random_pages(shape, 40), random_query(shape)
    completion = built(kind(), shape, pages, n_pages=40)
    before = estimate(completion, query, pages, [])
    estimate(completion, random_query(shape, 9), pages, all_pairs(pages)[::2])
    after = estimate(completion, query, pages, [])
    assert torch.equal(after.lse, before.lse)
    assert torch.equal(after.output, before.output)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_several_queries_of_a_row_are_estimated_as_if_each_came_alone(kind, padded):
    shape, n_queries = geometry(), 3
    pages = random_pages(shape, 40, padded=padded)
    completion = built(kind(), shape, pages, n_pages=40)
    queries = [random_query(shape, seed) for seed in range(n_queries)]
    reads = [[(0, 3), (0, 39), (1, 3)], [], [(0, 3), (1, 7)]]
    rows, ids = torch.tensor([(r * n_queries + i, p) for i, read in enumerate(reads) for r, p in read]).T.contiguous()
    valid = None if pages.valid is None else pages.valid[rows // n_queries, ids]
    slices = (pages.keys[rows // n_queries, ids], pages.values[rows // n_queries, ids])
    together = torch.stack(queries, 1).flatten(0, 1)
    given = completion.estimate(together, Fetched(*slices, valid, rows, ids), masses(together, pages))
    for i, (query, read) in enumerate(zip(queries, reads, strict=True)):
        expected = estimate(completion, query, pages, read)
        assert_close(given.lse[i::n_queries], expected.lse, atol=1e-5, rtol=1e-5)
        assert_close(given.output[i::n_queries], expected.output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", EVERY)
def test_absorbed_tensors_are_not_kept(kind):
    shape = geometry()
    pages, query = random_pages(shape, 10), random_query(shape)
    none, scores = fetch(pages, []), masses(query, pages)
    completion = built(kind(), shape, pages, n_pages=10)
    before = completion.estimate(query, none, scores)
    for tensor in (pages.keys, pages.values):
        tensor.fill_(float("nan"))
    assert torch.equal(completion.estimate(query, none, scores).lse, before.lse)


@pytest.mark.parametrize("kind", EVERY)
def test_a_reset_forgets_every_page(kind):
    shape = geometry()
    pages, query = random_pages(shape, 20), random_query(shape)
    completion = built(kind(), shape, random_pages(shape, 40, seed=4), n_pages=40)
    completion.reset(torch.zeros(shape.rows, shape.key_dim), n_pages=20)
    completion.absorb(pages)
    fresh = built(kind(), shape, pages, n_pages=20)
    given, expected = (estimate(c, query, pages, [(0, 3), (1, 19)]) for c in (completion, fresh))
    assert torch.equal(given.lse, expected.lse)
    assert torch.equal(given.output, expected.output)


@pytest.mark.parametrize("kind", EVERY)
def test_what_stands_at_padding_changes_no_estimate(kind):
    shape = geometry()
    pages, query = random_pages(shape, 20, padded=True), random_query(shape)
    outside = ~pages.valid[..., None]
    wild = Pages(pages.keys.masked_fill(outside, 30.0), pages.values.masked_fill(outside, 1e6), pages.valid)
    read = [(0, 1), (0, 7), (1, 0)]
    given, expected = (estimate(built(kind(), shape, p, n_pages=20), query, p, read) for p in (wild, pages))
    assert_close(given.lse, expected.lse, atol=1e-4, rtol=1e-4)
    assert_close(given.output, expected.output, atol=1e-4, rtol=1e-4)


def test_the_exact_completion_caps_its_logits():
    shape = Geometry(1, 2, 3, 8, 16, 4, torch.float32, 1.0, softcap=2.0)
    pages, query = random_pages(shape, 7), random_query(shape)
    rest = estimate(built(ExactCompletionConfig(), shape, pages), query, pages, [])
    logits = 2.0 * (torch.einsum("grd,gpsd->grps", query, pages.keys).flatten(2).double() / 2.0).tanh()
    assert_close(rest.lse, logits.logsumexp(-1).float(), atol=1e-5, rtol=1e-5)
    assert_close(rest.output, (logits.softmax(-1) @ pages.values.flatten(1, 2).double()).float(), atol=1e-5, rtol=1e-5)


def test_large_logits_do_not_overflow_a_summary():
    shape = geometry(group_size=1)
    pages = random_pages(shape, 12)
    loud = Pages(pages.keys * 40, pages.values, None)
    anchor = random_query(shape)[:, 0]
    for config in (AnchoredCompletionConfig(), PagesCompletionConfig()):
        completion = indexed(config.build(shape, 0, CPU))
        completion.reset(anchor, n_pages=12)
        completion.absorb(loud)
        rest = estimate(completion, anchor[:, None], loud, [])
        exact = torch.einsum("gd,gpsd->gps", anchor.double(), loud.keys.double()).flatten(1).logsumexp(-1)
        assert exact.abs().max() > 100  # e^100 is beyond fp32
        assert_close(rest.lse[:, 0], exact.float(), atol=1e-3, rtol=1e-5)


def gate_over(*configs):
    shape = geometry()
    return shape, GatedCompletion([indexed(c.build(shape, 0, CPU)) for c in configs], shape.value_dim)


def test_a_gate_takes_each_heads_choice_among_several():
    shape, gate = gate_over(PagesCompletionConfig(), ExactCompletionConfig())
    pages, query = random_pages(shape, 12), random_query(shape)
    gate.reset(torch.zeros(shape.rows, shape.key_dim), n_pages=12)
    gate.absorb(pages)
    gate.choice = torch.tensor([[2, 1, 0], [0, 2, 2]])
    read = [(0, 0), (1, 3)]
    given = estimate(gate, query, pages, read)
    options = [
        estimate(built(c, shape, pages, n_pages=12), query, pages, read)
        for c in (PagesCompletionConfig(), ExactCompletionConfig())
    ]
    for row in range(2):
        for head in range(3):
            choice = int(gate.choice[row, head])
            expected = options[choice - 1] if choice else Partial.empty(query, shape.value_dim)
            assert torch.equal(given.lse[row, head], expected.lse[row, head])
            assert torch.equal(given.output[row, head], expected.output[row, head])


def test_a_gate_abstains_until_it_is_set_and_after_a_reset():
    shape, gate = gate_over(ExactCompletionConfig())
    pages, query = random_pages(shape, 12), random_query(shape)
    gate.absorb(pages)
    assert estimate(gate, query, pages, []).lse.isneginf().all()
    gate.choice = torch.ones(2, 3, dtype=torch.int64)
    assert estimate(gate, query, pages, []).lse.isfinite().all()
    gate.reset(torch.zeros(shape.rows, shape.key_dim))
    gate.absorb(pages)
    assert estimate(gate, query, pages, []).lse.isneginf().all()


def test_a_gate_is_charged_for_every_candidate():
    shape, gate = gate_over(AnchoredCompletionConfig(), NoCompletionConfig(), PhiCompletionConfig())
    assert gate.state_bytes == sum(
        built(c, shape).state_bytes for c in (AnchoredCompletionConfig(), PhiCompletionConfig())
    )


def test_fetched_parts_join_in_order():
    shape = geometry()
    pages = random_pages(shape, 6, padded=True)
    parts = [fetch(pages, [(0, 0), (1, 2)]), fetch(pages, []), fetch(pages, [(0, 5)])]
    given, expected = Fetched.join(parts), fetch(pages, [(0, 0), (1, 2), (0, 5)])
    for name in ("keys", "values", "valid", "row_ids", "page_ids"):
        assert torch.equal(getattr(given, name), getattr(expected, name))


def test_slices_that_lie_in_places_are_copied_only_where_asked_for():
    pages = random_pages(geometry(), 6, padded=True)
    lying, expected = fetch(pages, [(0, p) for p in range(6)]), fetch(pages, [(0, 5), (0, 0), (0, 3)])
    ids, places = (expected.valid, expected.row_ids, expected.page_ids), torch.tensor([5, 0, 3])
    given = Fetched(lying.keys, lying.values, *ids, places=places)
    assert torch.equal(given.log_valid(), expected.log_valid())
    assert not {"keys", "values"} & given.__dict__.keys()
    for same in (given, given.clone(), Fetched.join([given])):
        assert torch.equal(same.keys, expected.keys)
        assert torch.equal(same.values, expected.values)
    kept = given.clone()
    lying.keys.zero_()
    assert torch.equal(kept.keys, expected.keys)
    assert kept.places is None


def test_a_masked_partial_contributes_nothing_where_it_is_masked():
    generator = torch.Generator().manual_seed(0)
    a, b = (
        Partial(torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, generator=generator)) for _ in range(2)
    )
    keep = torch.tensor([[True, False, True], [False, False, True]])
    given = merge([a, b.masked(keep)])
    assert torch.equal(given.output[~keep], a.output[~keep])
    assert_close(given.output[keep], merge([a, b]).output[keep])
