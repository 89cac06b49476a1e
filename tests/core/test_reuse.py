"""Choosing once and reusing the choice: PrHS, its baseline HShare, and TokenSelect."""

from itertools import pairwise

import pytest
import torch
from heads import geometry
from kvoffload_kernels.page_shares.reference import share_pages
from kvoffload_storage import TracingStore
from streams import ar1, filled, pairs_of, steps, stream, watch_selections
from torch.testing import assert_close

from kvoffload.policies.base import Depth
from kvoffload.policies.hshare import pair_heads
from kvoffload.policies.prhs import first_position
from kvoffload.policies.reuse import Dilation, QueryGate, Reusing
from kvoffload.policies.tokenselect import Votes
from kvoffload.selection.topk import take_best

N_PROMPT, N_NEW, BLOCK = 300, 40, 8
KINDS = ["prhs:block=8,tau=-1", "prhs", "hshare", "tokenselect", "tokenselect:tau=-1", "refresh", "retro:window=1"]


def run(policy=None, rho=0.97, shape=None, n=N_NEW, **fields):
    """Outputs of steps under a policy, and the layer behind them."""
    shape = shape or geometry()
    given = stream(shape, N_PROMPT + n, rho=rho)
    fields = {"selector": "exact", "completion": "none", "budget": "20%"} | fields
    layer = filled(shape, given, N_PROMPT, **fields, **({} if policy is None else {"policy": policy}))
    return steps(layer, given, N_PROMPT, n), layer


def test_an_inherited_set_keeps_the_oracles_mass_up_to_the_gates_bound():
    generator = torch.Generator().manual_seed(1)
    d, largest = 16, 0.0
    keys = torch.randn(200, d, generator=generator)
    for _ in range(200):
        first = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
        noise = torch.randn(d, generator=generator) * 0.1
        second = torch.nn.functional.normalize(first + noise, dim=0)
        tau = float(first @ second)
        assert QueryGate(tau - 1e-6).passes(second[None, None], first[None, None]).all()
        old, new = ((q @ keys.T / d**0.5).softmax(0) for q in (first, second))
        lost = new.topk(20).values.sum() - new[old.topk(20).indices].sum()
        bound = 2 * keys.norm(dim=1).max() / d**0.5 * (2 - 2 * tau) ** 0.5
        assert lost <= bound
        largest = max(largest, float(lost))
    assert largest > 0


def test_dilated_sets_keep_nine_tenths_of_the_oracles_mass_and_beat_random_extras():
    """Where neighbours in the sequence resemble each other, as the method supposes."""
    n_pages, k, rows, d = 96, 24, 4, 16
    keys = ar1(n_pages * 4, rows, d, rho=0.95, seed=3).transpose(0, 1).unflatten(1, (n_pages, 4))
    queries = ar1(200, rows, 1, d, rho=0.97, seed=4)
    dilation, gate, generator = Dilation(1 / 3, 1), QueryGate(0.8), torch.Generator().manual_seed(5)
    counts = torch.full((rows,), k)
    kept, dilated_mass, random_mass = [], [], []
    for start in range(0, 200, 8):
        shares = masses_of(queries[start], keys)
        row_ids, page_ids = take_best(shares, counts)
        dilated = take_best(dilation.dilated(shares, counts), counts)
        n_extra = len(pairs(*dilated) - pairs(row_ids, page_ids))
        for query in queries[start + 1 : start + 8]:
            passed = gate.passes(query, queries[start])
            now = masses_of(query, keys).exp()
            oracle = now.topk(k, dim=1).values.sum(1)
            mine = captured(now, *dilated)
            other = captured(now, *with_random(shares, counts, n_extra // rows, n_pages, generator))
            kept += (mine / oracle)[passed].tolist()
            dilated_mass.append(mine.mean())
            random_mass.append(other.mean())
    assert len(kept) > 100
    assert sum(kept) / len(kept) >= 0.9
    assert sum(dilated_mass) > sum(random_mass)


def masses_of(query, keys):
    """Log shares of pages [rows, P] for queries [rows, 1, D]."""
    logits = torch.einsum("grd,gpsd->grps", query, keys) / keys.shape[-1] ** 0.5
    return share_pages(logits.logsumexp(-1), torch.full(query.shape[:2], -torch.inf))


def pairs(row_ids, page_ids):
    return set(zip(row_ids.tolist(), page_ids.tolist(), strict=True))


def captured(shares, row_ids, page_ids):
    return torch.zeros_like(shares).index_put((row_ids, page_ids), shares[row_ids, page_ids]).sum(1)


def with_random(shares, counts, n_extra, n_pages, generator):
    """The best pages but for the last ``n_extra``, in whose place random ones stand."""
    row_ids, page_ids = take_best(shares, counts - n_extra)
    noise = torch.rand(shares.shape, generator=generator).index_put((row_ids, page_ids), torch.tensor(-torch.inf))
    extra = take_best(noise, torch.full_like(counts, n_extra))
    return torch.cat([row_ids, extra[0]]), torch.cat([page_ids, extra[1]])


@pytest.mark.parametrize("policy", ["prhs:block=1", "prhs:block=8,tau=1", "hshare:steps=1,heads=false,layers=false"])
@pytest.mark.parametrize("pool", ["layer", "none"])
def test_off_means_off(policy, pool):
    """s = 1, and a gate that nothing passes, give the wrapped selector's outputs to the bit, with the same counts."""
    (given, layer), (expected, plain) = run(policy, pool=pool), run(pool=pool)
    assert torch.equal(given, expected)
    assert layer.meter.scored_rows == plain.meter.scored_rows
    assert layer.fetch.decode.total() == plain.fetch.decode.total()


@pytest.mark.parametrize("policy", KINDS)
def test_a_full_budget_is_dense(policy):
    given, _ = run(policy, budget="100%")
    expected, _ = run(budget="100%")
    assert_close(given, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", KINDS)
def test_nothing_is_lost_beside_the_exact_completion(policy):
    given, _ = run(policy, completion="exact")
    expected, _ = run(budget="100%")
    assert_close(given, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", KINDS)
@pytest.mark.parametrize("pool", ["layer", "none"])
def test_a_step_never_reads_more_than_its_budget(policy, pool):
    shape = geometry()
    given = stream(shape, N_PROMPT + N_NEW, rho=0.9)
    layer = filled(shape, given, N_PROMPT, selector="exact", completion="none", policy=policy, pool=pool)
    asked, start = [], layer.fetch.start
    layer.fetch.start = lambda selection: asked.append((selection, layer.budget(layer.n_tokens))) or start(selection)
    steps(layer, given, N_PROMPT, N_NEW)
    assert len(asked) > N_NEW / 2  # full steps of refresh stream
    for selection, n_slices in asked:
        assert len(pairs_of(selection)) == len(selection) <= n_slices


def test_scorings_are_one_a_block_where_every_step_passes():
    _, layer = run(f"prhs:block={BLOCK},tau=-1")
    assert layer.meter.scored_rows == N_NEW // BLOCK * layer.geometry.rows


@pytest.mark.parametrize("rho", [0.2, 0.9, 0.97, 0.999])
def test_scorings_are_at_most_the_blocks_and_the_failures(rho):
    shape = geometry(group_size=1)
    given = stream(shape, N_PROMPT + N_NEW, rho=rho)
    layer = filled(shape, given, N_PROMPT, selector="exact", completion="none", policy=f"prhs:block={BLOCK}")
    failures, nearest = [], layer.chooser._nearest
    layer.chooser._nearest = lambda *args: failures.append((found := nearest(*args))[0]) or found
    steps(layer, given, N_PROMPT, N_NEW)
    n_blocks = N_NEW - len(failures)  # steps that began one without asking
    assert n_blocks <= -(-N_NEW // BLOCK)
    assert layer.meter.scored_rows <= n_blocks * shape.rows + sum(int(f.sum()) for f in failures)
    assert (layer.meter.scored_rows < 0.7 * shape.rows * N_NEW) == (rho > 0.8)


def test_rows_that_fail_are_scored_anew_and_the_others_keep_their_pages():
    shape = geometry(group_size=1)
    query, keys, values = stream(shape, N_PROMPT + 4, rho=1.0)
    query[1, :, N_PROMPT + 2 :] *= -1
    layer = filled(shape, (query, keys, values), N_PROMPT, selector="exact", completion="none", policy="prhs:hits=0")
    seen = watch_selections(layer)
    steps(layer, (query, keys, values), N_PROMPT, 4)
    kept, turned = ([{p for r, p in pairs_of(s) if r == row} for s in seen] for row in (0, 1))
    assert kept[0] == kept[1] == kept[2] == kept[3]
    assert turned[0] == turned[1] != turned[2] == turned[3]
    assert len(turned[2]) == len(turned[0])
    assert layer.meter.scored_rows == 3


@pytest.mark.parametrize("policy", ["prhs:block=6", "prhs:block=5,anchors=2", "hshare", "tokenselect:tau=0.8"])
def test_sequences_side_by_side_choose_as_alone(policy):
    """Also where one begins a block because none of its rows passed, in the middle of another's."""
    shape = geometry(n_sequences=2)
    query, keys, values = stream(shape, N_PROMPT + N_NEW, rho=0.995)
    query = query.clone()
    for turn in (3, 11, 26):
        query[:2, :, N_PROMPT + turn :] *= -1
    fields = {"selector": "exact", "completion": "none", "policy": policy}
    both = filled(shape, (query, keys, values), N_PROMPT, **fields)
    seen, n_scored = watch_selections(both), 0
    steps(both, (query, keys, values), N_PROMPT, N_NEW)
    for first in (0, 2):
        given = query[first : first + 2], keys[first : first + 2], values[first : first + 2]
        alone = filled(geometry(), given, N_PROMPT, **fields)
        mine = watch_selections(alone)
        steps(alone, given, N_PROMPT, N_NEW)
        n_scored += alone.meter.scored_rows
        for theirs, own in zip(seen, mine, strict=True):
            assert {(r - first, p) for r, p in pairs_of(theirs) if r // 2 == first // 2} == pairs_of(own)
    assert both.meter.scored_rows == n_scored


def test_a_common_bias_makes_queries_alike_unless_they_are_centred():
    shape = geometry(group_size=1)
    query, keys, values = stream(shape, N_PROMPT + N_NEW, rho=0.0)
    biased = query + 10 * torch.ones(shape.key_dim)
    scored = {}
    for name, centred in (("raw", "false"), ("centred", "true")):
        policy = f"prhs:block=1000,centred={centred}"
        layer = filled(shape, (biased, keys, values), N_PROMPT, selector="exact", completion="none", policy=policy)
        steps(layer, (biased, keys, values), N_PROMPT, N_NEW)
        scored[name] = layer.meter.scored_rows
    assert scored["raw"] == shape.rows
    assert scored["centred"] > 0.9 * shape.rows * N_NEW


def test_with_several_anchors_a_query_that_comes_back_is_not_scored_again():
    """Two queries in turns: one anchor is right every second time, two are always."""
    shape = geometry(group_size=1)
    query, keys, values = stream(shape, N_PROMPT + N_NEW, rho=1.0)
    query = query.clone()
    query[:, :, N_PROMPT + 1 :: 2] *= -1
    scored, sets = [], []
    for anchors in (1, 2):
        policy = f"prhs:block=1000,hits=0,anchors={anchors}"
        layer = filled(shape, (query, keys, values), N_PROMPT, selector="exact", completion="none", policy=policy)
        seen = watch_selections(layer)
        steps(layer, (query, keys, values), N_PROMPT, N_NEW)
        scored.append(layer.meter.scored_rows)
        sets.append({frozenset(pairs_of(s)) for s in seen[2:]})
    assert scored == [N_NEW * shape.rows, 2 * shape.rows]
    assert len(sets[1]) == 2


def test_an_inherited_selection_holds_the_best_hits_and_their_neighbours():
    ranking = torch.tensor([[9.0, 1, 2, 3, 8, 4, 5, 7, 6, 0]])
    page_ids = take_best(ranking, torch.tensor([6]))[1]
    _, dilated = take_best(Dilation(1 / 3, 1).dilated(ranking, torch.tensor([6])), torch.tensor([6]))
    assert set(page_ids.tolist()) == {0, 4, 7, 8, 6, 5}
    assert set(dilated.tolist()) == {0, 4, 1, 3, 5, 7}  # the best two, beside them 1, 3 and 5, and the best of the rest


def test_a_window_begins_behind_its_layer_and_grows_towards_the_last():
    starts = [first_position(Depth(i, 12), 1000, start=4, keep=0.5, power=2.0) for i in range(12)]
    assert starts[:4] == [0, 0, 0, 0]
    assert sorted(starts) == starts
    assert all(a < b for a, b in pairwise(starts[3:]))
    assert starts[-1] == 750  # the last layer keeps 0.5^2


def test_pages_below_the_window_are_read_last():
    shape = geometry()
    given = stream(shape, N_PROMPT + 4)
    fields = {"selector": "exact", "completion": "none", "policy": "prhs:block=1,window_from=1"}
    layer = filled(shape, given, N_PROMPT, **fields)
    assert (
        layer.page_filter(layer, torch.zeros(2, 3, layer.n_pages)).isneginf().sum() == 0
    )  # the only layer is number 1
    layer.page_filter._depth = Depth(3, 4)
    seen = watch_selections(layer)
    steps(layer, given, N_PROMPT, 4)
    lowest = min(page for selection in seen for _, page in pairs_of(selection))
    assert lowest == (first_position(Depth(3, 4), N_PROMPT + 1, start=1, keep=0.5, power=1.0) - 4) // 4


def test_votes_are_shares_and_not_logits():
    """A head whose logits are huge cannot outvote the others."""
    shape = geometry(n_kv_heads=2, group_size=2)
    given = stream(shape, N_PROMPT + 1)
    layer = filled(shape, given, N_PROMPT, selector="exact", completion="none", policy="tokenselect:tau=1")
    layer.selector.score = lambda query: torch.stack([loud, quiet, quiet, quiet]).view(2, 2, -1)
    loud, quiet = torch.zeros(layer.n_pages), torch.zeros(layer.n_pages)
    loud[3], quiet[7] = 1000.0, 5.0
    ranking = layer.chooser.rank(layer, layer.selector.score(None), torch.zeros(2, 2))
    assert torch.equal(ranking[0], ranking[1])
    expected = torch.stack([loud, quiet, quiet, quiet]).softmax(-1).sum(0)
    assert_close(ranking[0], expected)
    assert int(ranking[0].argmax()) == 7
    assert int((loud + 3 * quiet).argmax()) == 3


@pytest.mark.parametrize("n_sequences", [1, 2])
def test_all_heads_of_a_sequence_read_one_set(n_sequences):
    shape = geometry(n_sequences=n_sequences)
    given = stream(shape, N_PROMPT + 6)
    layer = filled(shape, given, N_PROMPT, selector="exact", completion="none", policy="tokenselect")
    seen = watch_selections(layer)
    steps(layer, given, N_PROMPT, 6)
    for selection in seen:
        sets = [{p for r, p in pairs_of(selection) if r == row} for row in range(shape.rows)]
        for first in range(0, shape.rows, shape.n_kv_heads):
            assert sets[first] == sets[first + 1] != set()
    if n_sequences == 2:
        assert sets[0] != sets[2]


def test_with_pages_of_one_token_single_tokens_are_selected():
    """The votes are those of TokenSelect's definition: softmax over the middle of each head, added up."""
    shape = geometry(page_size=1)
    given = stream(shape, N_PROMPT + 1)
    fields = {"selector": "exact", "completion": "none", "policy": "tokenselect:tau=1", "page_size": 1, "recent": 8}
    layer = filled(shape, given, N_PROMPT, **fields)
    seen = watch_selections(layer)
    steps(layer, given, N_PROMPT, 1)
    query, keys, _ = given
    middle = keys[:, 4 : 4 + layer.n_pages]
    votes = torch.einsum("grd,gnd->grn", query[:, :, N_PROMPT], middle).softmax(-1).sum((0, 1))
    k = len(seen[0]) // shape.rows
    assert {p for _, p in pairs_of(seen[0])} == set(votes.topk(k).indices.tolist())


def test_scattered_tokens_are_found_by_tokens_and_missed_by_pages_of_equal_bytes():
    shape = geometry(page_size=16, key_dim=8)
    generator = torch.Generator().manual_seed(2)
    needles = torch.arange(8, 500, 31)
    found = {}
    for name, size, options in (("tokens", 1, {"selector": "exact", "policy": "tokenselect:tau=1"}),
                                ("pages", 16, {"selector": "bounds"})):  # fmt: skip
        query, keys, values = stream(geometry(page_size=size), 521, rho=1.0)
        keys = torch.randn(keys.shape, generator=generator) * 1.5
        direction = torch.nn.functional.normalize(query[:, 0, -1], dim=-1)
        keys[:, needles] = 4 * direction[:, None]
        query = (4 * direction)[:, None, None].expand_as(query).contiguous()
        given = query, keys, values
        layer = filled(
            geometry(page_size=size), given, 520, page_size=size, recent=16, budget="32", completion="none", **options
        )
        seen = watch_selections(layer)
        steps(layer, given, 520, 1)
        read = {4 + p * size + i for r, p in pairs_of(seen[0]) if r == 0 for i in range(size)}
        found[name] = len(read & set(needles.tolist())) / len(needles)
    assert shape.key_dim == 8
    assert found["tokens"] == 1.0
    assert found["pages"] < 0.5


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.9), (0.9, 0.98)])
def test_a_stricter_selection_cache_hits_less_often_and_loses_less(low, high):
    scored, lost = [], []
    expected, _ = run("tokenselect:tau=1", rho=0.99)
    for tau in (low, high):
        given, layer = run(f"tokenselect:tau={tau}", rho=0.99)
        scored.append(layer.meter.scored_rows)
        lost.append(float((given - expected).norm()))
    assert scored[0] < scored[1]
    assert lost[0] >= lost[1]


def test_half_of_the_heads_take_the_set_most_like_theirs():
    sets = torch.zeros(4, 8, dtype=torch.bool)
    sets[0, :4], sets[1, 4:], sets[2, 4:7], sets[3, :3] = True, True, True, True
    assert pair_heads(sets, 4).tolist() == [0, 1, 1, 0]
    assert pair_heads(torch.cat([sets, sets.flip(0)]), 4).tolist() == [0, 1, 1, 0, 4, 5, 5, 4]


def test_hshare_scores_half_of_the_heads_every_second_step():
    _, layer = run("hshare:layers=false", shape=geometry(n_kv_heads=4))
    assert layer.meter.scored_rows == 4 + (N_NEW // 2 - 1) * 2


@pytest.mark.parametrize("policy", ["prhs", "tokenselect", "refresh"])
def test_a_page_cache_serves_inherited_pages(policy):
    """The device holds a selection's pages: a block moves its anchor step's pages once."""
    shape = geometry()
    given = stream(shape, N_PROMPT + N_NEW, rho=0.999)
    moved = []
    for options in ({}, {"policy": policy, "gpu_cache": "16KiB"}):
        layer = filled(shape, given, N_PROMPT, selector="exact", completion="none", wrap=TracingStore, **options)
        if policy == "refresh" and options:
            layer.chooser.choose(layer, given[0][:, :, N_PROMPT - 1], torch.zeros(2, 3))
        steps(layer, given, N_PROMPT, N_NEW)
        moved.append(layer.fetch.decode.total().cpu)
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("policy", ["prhs:block=16,tau=-1+tokenselect:tau=1", "tokenselect:tau=1+prhs:block=16,tau=-1"])
def test_votes_are_chosen_once_a_block_in_either_order(policy):
    shape = geometry()
    given = stream(shape, N_PROMPT + 4)
    layer = filled(shape, given, N_PROMPT, selector="exact", completion="none", policy=policy)
    steps(layer, given, N_PROMPT, 4)
    assert layer.meter.scored_rows == shape.rows
    assert isinstance(layer.chooser, Reusing)
    assert isinstance(layer.chooser._inner, Votes)
