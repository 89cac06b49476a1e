"""Re-anchoring while generating: a second state is built beside the steps, and replaces the first when it has caught
up."""

from itertools import pairwise

import pytest
import torch
from heads import fetch, geometry, masses, random_pages, random_query
from kvoffload_storage import WrapperStore
from layers import new_layer, step, take_in, tokens
from torch.testing import assert_close

from kvoffload.attention.prefill import prepare
from kvoffload.config import VARIANTS
from kvoffload.values import Pages

N_PROMPT, EVERY = 150, 16
ANCHORED = [kind for kind in VARIANTS["completion"] if new_layer(geometry(), completion=kind).completion.uses_anchor]


class Hidden(WrapperStore):
    """Not addressable: its pages are read by request."""

    def mapped(self, layer):
        return None


def filled(n_new=70, padding=None, n_sequences=1, **fields):
    """A layer behind its prefill, and its tokens."""
    layer = new_layer(geometry(n_sequences=n_sequences), **({"reanchor": EVERY, "completion": "pages"} | fields))
    given = tokens(layer.geometry, N_PROMPT + n_new)
    query, keys, values = given
    take_in(layer, query[:, :, :N_PROMPT], keys[:, :N_PROMPT], values[:, :N_PROMPT], padding)
    return layer, given


def steps(layer, given, first, n):
    """Single steps of the new tokens first .. first + n - 1."""
    return [step(layer, *given, slice(N_PROMPT + i, N_PROMPT + i + 1)) for i in range(first, first + n)]


def step_until_replaced(layer, given, part):
    """How many steps it took."""
    before = getattr(layer, part)
    for i in range(60):
        steps(layer, given, i, 1)
        if getattr(layer, part) is not before:
            return i + 1
    raise AssertionError("never replaced")


def all_pages(layer):
    parts = [(p.keys.clone(), p.values.clone()) for p in layer.fetch.stream(7)]
    keys, values = (torch.cat(t, 1) for t in zip(*parts, strict=True))
    return Pages(keys, values, layer.anchors.run_valid(0, keys.shape[1]))


def new_anchor(layer, given):
    """The mean of the first EVERY queries after the prompt."""
    return given[0][:, :, N_PROMPT : N_PROMPT + EVERY].mean((1, 2)) * layer.geometry.scale


def estimate(completion, query, pages):
    """Of everything, nothing being read."""
    return completion.estimate(query, fetch(pages, []), masses(query, pages))


@pytest.mark.parametrize("padding", [None, torch.tensor([0, 0, 13, 13])])
@pytest.mark.parametrize("wrap", [lambda store: store, Hidden], ids=["mapped", "submitted"])
@pytest.mark.parametrize("completion", ["anchored:segments=4", *ANCHORED])
def test_the_new_completion_is_one_built_around_the_newest_queries(completion, wrap, padding):
    fields = {"completion": completion, "wrap": wrap, "padding": padding}
    layer, given = filled(n_sequences=2, **fields)
    n_pages = (N_PROMPT + EVERY - 4 - 8) // 4
    step_until_replaced(layer, given, "completion")
    fresh = new_layer(layer.geometry, completion=completion).completion
    fresh.index = layer.completion.index
    fresh.reset(new_anchor(layer, given), n_pages=n_pages)
    pages, query = all_pages(layer), random_query(layer.geometry)
    fresh.absorb(pages)
    now, expected = (estimate(c, query, pages) for c in (layer.completion, fresh))
    assert_close(now.lse, expected.lse, atol=1e-4, rtol=1e-4)
    assert_close(now.output, expected.output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("index", ["device", "cpu"])
def test_the_new_index_is_one_built_around_the_newest_queries(index):
    layer, given = filled(selector="anchored", completion="none", index=index)
    step_until_replaced(layer, given, "selector")
    fresh = new_layer(layer.geometry, selector="anchored").selector
    fresh.reset(new_anchor(layer, given))
    fresh.absorb(all_pages(layer))
    query = random_query(layer.geometry)
    assert_close(layer.selector.score(query), fresh.score(query), atol=1e-5, rtol=1e-5)


def test_steps_go_on_with_the_old_state_until_the_new_one_has_caught_up():
    (new, given), (old, _) = filled(), filled(reanchor="off")
    n_steps = step_until_replaced(filled()[0], given, "completion")
    assert EVERY < n_steps < 2 * EVERY
    before = zip(steps(new, given, 0, n_steps), steps(old, given, 0, n_steps), strict=True)
    assert all(torch.equal(a, b) for a, b in before)
    assert not torch.equal(steps(new, given, n_steps, 1)[0], steps(old, given, n_steps, 1)[0])


@pytest.mark.parametrize("fields", [{}, {"gate": True, "gate_recheck": 16, "gate_queries": 4}], ids=str)
def test_a_full_budget_is_dense_at_every_step(fields):
    layer, given = filled(selector="anchored", completion="anchored", budget="100%", **fields)
    query, keys, values = (t.double() for t in given)
    for i, found in enumerate(steps(layer, given, 0, 60)):
        n = N_PROMPT + i + 1
        logits = torch.einsum("grd,gnd->grn", query[:, :, n - 1] * layer.geometry.scale, keys[:, :n])
        expected = torch.cat([logits.softmax(-1) @ values[:, :n], logits.logsumexp(-1)[..., None]], dim=-1)
        assert_close(found[:, :, 0], expected.float(), atol=1e-4, rtol=1e-4)
    assert layer.fetch.refresh.total().cpu > 0


def test_a_pass_is_spread_over_steps_and_counted_apart():
    (new, given), (old, _) = filled(), filled(reanchor="off")
    page_bytes, seen, prefilled = new.store.shape.page_bytes, [0], new.fetch.prefill.total()
    n_pages = (N_PROMPT + EVERY - 4 - 8) // 4
    for i in range(2 * EVERY - 1):
        steps(new, given, i, 1)
        seen.append(new.fetch.refresh.total().cpu)
    moved = [after - before for before, after in pairwise(seen)]
    assert max(moved) <= -(-n_pages // (EVERY // 2)) * page_bytes
    assert not any(moved[:EVERY])
    assert n_pages * page_bytes <= sum(moved) <= (n_pages + 3) * page_bytes  # and what sealed meanwhile
    steps(old, given, 0, 2 * EVERY - 1)
    assert new.fetch.decode.total() == old.fetch.decode.total()
    assert new.fetch.prefill.total() == prefilled


def test_passes_follow_each_other():
    layer, given = filled()
    states = []
    for i in range(70):
        steps(layer, given, i, 1)
        states += [layer.completion] if layer.completion not in states else []
    assert len(states) == 1 + 3  # begun behind 16, 32 and 48 tokens; the one behind 64 is under way


def test_where_nothing_depends_on_the_anchor_nothing_is_read():
    layer, given = filled(selector="bounds", completion="none")
    steps(layer, given, 0, 40)
    assert layer.upkeep == ()
    assert layer.fetch.refresh.total().cpu == 0


def test_a_prefill_forgets_the_pass_under_way():
    layer, given = filled()
    steps(layer, given, 0, EVERY + 2)
    assert layer.upkeep[0].resident_bytes > 0
    layer.ready = False
    prepare(layer)
    assert layer.upkeep[0].resident_bytes == 0
    before = layer.completion
    steps(layer, given, EVERY + 2, EVERY)
    assert layer.completion is before
    steps(layer, given, 2 * EVERY + 2, EVERY)
    assert layer.completion is not before


def test_a_gate_keeps_its_choice_over_a_pass():
    layer, given = filled(completion="pages+none", gate=True)
    layer.gate.choice = torch.tensor([[1, 0, 2], [0, 1, 1]])
    step_until_replaced(layer, given, "completion")
    assert layer.gate is layer.completion
    assert layer.gate.choice.tolist() == [[1, 0, 2], [0, 1, 1]]


def test_the_second_state_is_resident_while_it_is_built():
    layer, given = filled()
    steps(layer, given, 0, EVERY)
    before = layer.resident_bytes
    steps(layer, given, EVERY, 4)
    sealed = layer.completion.state_bytes // layer.n_pages + layer.selector.resident_bytes // layer.n_pages
    assert layer.resident_bytes > before + sealed


@pytest.mark.parametrize(("slot", "kind"), [(slot, kind) for slot in VARIANTS for kind in VARIANTS[slot]])
def test_what_depends_on_the_anchor_says_so(slot, kind):
    shape = geometry()
    pages, query, found = random_pages(shape, 550), random_query(shape), []
    for seed in (2, 3):
        layer = new_layer(shape, **({"completion": "none"} | {slot: kind}))
        layer.selector.reset(random_query(shape, seed)[:, 0])
        layer.completion.reset(random_query(shape, seed)[:, 0])
        layer.absorb(pages)
        built = getattr(layer, slot)
        found.append(built.score(query) if slot == "selector" else estimate(built, query, pages).output)
    assert built.uses_anchor == (not torch.equal(*found))
