"""Policies on a whole model: what they compute anew, what they cost, and that they are off when they are off."""

from itertools import pairwise

import pytest
import torch
from tiny import SMALL
from torch.testing import assert_close

from kvoffload.config import POLICIES, RuntimeConfig, SamplingConfig
from kvoffload.errors import UsageError
from kvoffload.evaluation.tasks.generation import answer, prefill_prompt
from kvoffload.evaluation.teacher import prefill, teacher_forced
from kvoffload.models.cache import OffloadCache
from kvoffload.models.self_test import switch_attention
from kvoffload.runtime.engine import Runtime

N_PROMPT, N_NEW, EVERY = 160, 32, 8
BASE = SMALL | {"recent": 16, "selector": "bounds", "completion": "none", "budget": "5%"}
OFF = ["retro:window=1", "prhs:block=1", "prhs:tau=1", "hshare:steps=1,heads=false,layers=false", "none"]
ON = ["retro:window=4", "resa:every=8", "refresh", "prhs", "tokenselect", "hshare", "retro:window=3+resa:every=8",
      "prhs+retro:window=3", "refresh+resa:every=8"]  # fmt: skip


@pytest.fixture(scope="module")
def model(loaded):
    switch_attention(loaded.model)
    return loaded.model


def ids(n_sequences=1, n=N_PROMPT + N_NEW, seed=5):
    return torch.randint(0, 256, (n_sequences, n), generator=torch.Generator().manual_seed(seed))


def run(model, watch=None, n_sequences=1, given=None, **fields):
    """Logits after each new token; ``watch`` hears of the cache behind each."""
    given = ids(n_sequences) if given is None else given
    with OffloadCache(model.config, RuntimeConfig(**(BASE | fields))) as cache:
        prefill(model, cache, given[:, :N_PROMPT])
        logits = []
        for i in range(N_PROMPT, given.shape[1]):
            logits.extend(teacher_forced(model, cache, given[:, i : i + 1]))
            if watch is not None:
                watch(cache)
    return torch.cat(logits, 1)


def keys_and_values(cache):
    """All tokens' K and V of every layer, in order."""
    found = []
    for layer in cache.offloaded:
        for i, buffer in enumerate(layer.anchors.buffers):
            sinks, window = layer.anchors.in_order(buffer)
            pages = [(p.keys, p.values)[i].flatten(1, 2).clone() for p in layer.fetch.stream(1000)]
            found.append(torch.cat([sinks, *pages, window], 1).clone())
    return found


def drift(model, policy):
    """Behind every new token, how far K and V of the deepest layer are from dense ones."""
    dense, mine = [], []
    run(model, lambda cache: dense.append(keys_and_values(cache)[-1]), budget="100%")
    run(model, lambda cache: mine.append(keys_and_values(cache)[-1]), policy=policy)
    return [float((a - b).norm()) for a, b in zip(mine, dense, strict=True)]


@pytest.mark.parametrize("completion", ["none", "pages"])
@pytest.mark.parametrize("policy", OFF)
def test_off_means_off(model, policy, completion):
    assert torch.equal(run(model, policy=policy, completion=completion), run(model, completion=completion))


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
@pytest.mark.parametrize("policy", ON)
def test_a_full_budget_is_dense(model, policy, offload):
    expected = run(model, budget="100%")
    given = run(model, policy=policy, budget="100%", offload=offload)
    assert_close(given, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", ON)
def test_nothing_is_lost_or_counted_twice_beside_the_exact_completion(model, policy):
    expected = run(model, budget="100%")
    assert_close(run(model, policy=policy, completion="exact"), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", POLICIES)
def test_every_policy_of_the_union_keeps_its_promises_as_it_comes(model, kind):
    """Dense at a full budget; dense beside the exact completion; no step selects more than its budget."""
    fields = {"recent": 40, "budget": "100%"}
    expected = run(model, **fields)
    assert_close(run(model, policy=kind, **fields), expected, atol=1e-4, rtol=1e-4)
    fields = {"recent": 40, "budget": "8%", "completion": "exact"}
    asked = []
    given = run(model, lambda cache: asked.append([x.fetch.n_asked for x in cache.offloaded]), policy=kind, **fields)
    assert_close(given, expected, atol=1e-4, rtol=1e-4)
    most = int(0.08 * (N_PROMPT + N_NEW)) // 4 * 2 + 1
    assert all(b - a <= most for old, new in pairwise(asked) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("policy", ON)
def test_sequences_side_by_side_are_those_alone(model, policy):
    """But for the pooled gates of a layer, which ask all sequences; these pass alike here."""
    policy = policy.replace("refresh", "refresh:cosine=-1")
    both = run(model, policy=policy, n_sequences=2)
    for i in range(2):
        alone = run(model, policy=policy, given=ids(2)[i : i + 1])
        assert_close(both[i : i + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", ["resa:every=8", "retro:window=4"])
def test_padded_sequences_are_answered_as_alone(loaded, model, policy):
    config = RuntimeConfig(**(BASE | {"policy": policy, "budget": "100%"}))
    prompts = [prefill_prompt(loaded, ids(1, n)[0].tolist(), config, max_new_tokens=20) for n in (90, 101)]
    both = answer(loaded, prompts, config).texts
    alone = tuple(answer(loaded, [prompt], config).texts[0] for prompt in prompts)
    plain = answer(loaded, prompts, RuntimeConfig(**(BASE | {"budget": "100%"}))).texts
    for prompt in prompts:
        prompt.cache.close()
    assert both == alone == plain


def test_a_dense_pass_gives_dense_keys_and_values(model):
    """By induction everything behind a pass equals dense teacher forcing."""
    states = {}
    for policy, budget in (("resa:every=8", "5%"), ("none", "5%"), ("none", "100%")):
        run(
            model,
            lambda cache, at=(policy, budget): states.__setitem__(at, keys_and_values(cache)),
            policy=policy,
            budget=budget,
        )
    dense, rectified, sparse = (states[at] for at in (("none", "100%"), ("resa:every=8", "5%"), ("none", "5%")))
    for mine, expected in zip(rectified, dense, strict=True):
        assert_close(mine, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sparse[-1], dense[-1], atol=1e-3)


def test_a_pass_after_every_token_keeps_dense_keys_and_values(model):
    assert max(drift(model, "resa:every=1")) < 1e-3


def test_drift_is_a_sawtooth_of_the_period_and_grows_without_passes(model):
    rectified, sparse = drift(model, f"resa:every={EVERY}"), drift(model, "none")
    behind = rectified[EVERY - 1 :: EVERY]
    assert max(behind) < 1e-3
    for start in range(0, N_NEW, EVERY):
        assert sorted(rectified[start : start + EVERY - 1]) == rectified[start : start + EVERY - 1]
    assert sorted(sparse) == sparse
    assert max(rectified) < sparse[-1] / 2


def test_a_pass_over_many_rows_is_many_passes_over_one(model):
    many, single = [], []
    run(model, lambda cache: many.append(keys_and_values(cache)), policy=f"resa:every={EVERY}")
    run(model, lambda cache: single.append(keys_and_values(cache)), policy="resa:every=1")
    for mine, other in zip(many[-1], single[-1], strict=True):
        assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_the_traffic_of_passes_is_the_context_once_every_so_many_tokens(model):
    moved, pages = {}, []
    for policy in ("none", f"resa:every={EVERY}"):
        run(
            model,
            lambda cache, at=policy: moved.__setitem__(at, [x.fetch.decode.total().cpu for x in cache.offloaded]),
            policy=policy,
        )
    run(model, lambda cache: pages.append([(x.n_pages, x.store.shape.page_bytes) for x in cache.offloaded]))
    for layer, (plain, mine) in enumerate(zip(*moved.values(), strict=True)):
        passes = [pages[i][layer] for i in range(EVERY - 1, N_NEW, EVERY)]
        assert mine - plain == sum(n * size for n, size in passes) > 0


def test_a_pass_comes_when_the_estimated_dropped_mass_adds_up(model):
    passes = {}
    for mass in (0.5, 2.0, 1e6):
        fields = {"policy": f"resa:every=16,mass={mass}", "completion": "pages"}
        run(model, lambda cache, at=mass: passes.__setitem__(at, cache.policies[0].n_passes), **fields)
    assert passes[0.5] > passes[2.0] > passes[1e6] == N_NEW // 16


def test_revised_tokens_get_other_keys_in_deeper_layers_only(model):
    states = []
    for policy in ("retro:window=4", "none"):
        run(model, lambda cache: states.append(keys_and_values(cache)), policy=policy)
    mine, plain = states[N_NEW - 1], states[-1]
    assert_close(mine[0], plain[0], atol=1e-5, rtol=1e-5)
    assert_close(mine[-1][:, :N_PROMPT], plain[-1][:, :N_PROMPT], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mine[-1][:, N_PROMPT:], plain[-1][:, N_PROMPT:], atol=1e-4)


def test_with_more_revisions_keys_and_values_come_nearer_to_dense_ones(model):
    last = [drift(model, f"retro:window={w}")[-1] for w in (1, 4, 12)]
    assert last[2] < last[1] < last[0]


@pytest.mark.parametrize("completion", ["none", "anchored"])
@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_revisions_read_no_page_more(model, offload, completion):
    counts = []
    for policy in ("retro:window=6", "none"):
        fields = {"policy": policy, "offload": offload, "completion": completion, "budget": "16"}
        found = []
        run(model, lambda cache, found=found: found.append(
            [(x.fetch.n_asked, x.meter.steps, x.meter.context_tokens) for x in cache.offloaded]), **fields)  # fmt: skip
        counts.append(found[-1])
    assert counts[0] == counts[1]


def test_a_cropped_session_revises_nothing_before_the_crop(loaded):
    session = Runtime(loaded, RuntimeConfig(**(BASE | {"policy": "retro:window=4"}))).session()
    with session:
        session.prefill(ids()[0, :N_PROMPT].tolist())
        for token in (5, 6, 7, 8):
            session.step(token)
        session.crop(2)
        assert session.cache.anew.revised(session.cache.offloaded) == 0
        assert session.step(9).isfinite().all()


@pytest.mark.parametrize("policy", ON)
def test_a_session_generates_and_goes_on_under_every_policy(loaded, policy):
    with Runtime(loaded, RuntimeConfig(**(BASE | {"policy": policy, "completion": "pages"}))).session() as session:
        session.prefill(ids()[0, :N_PROMPT].tolist())
        session.generate(SamplingConfig(max_new_tokens=20))
        session.prefill([3, 4, 5])
        session.generate(SamplingConfig(max_new_tokens=5))
        stats = session.stats()
    assert stats.new_tokens <= 25
    assert 0 <= stats.scored_share <= 1
    assert stats.read_share > 0


def test_what_the_policy_cannot_work_with_is_refused(loaded):
    for policy, told in (
        ("retro:window=17", "must not exceed recent=16"),
        ("resa:every=17", "must not exceed recent=16"),
        ("retro+refresh", "give one of the two"),
        ("prhs+refresh", "give one of the two"),
        ("retro+retro", "given twice"),
    ):
        with pytest.raises(ValueError, match=told):
            RuntimeConfig(**(BASE | {"policy": policy}))
    with pytest.raises(UsageError, match="use a session"):
        Runtime(None, RuntimeConfig(**(BASE | {"policy": "retro"}))).attach(loaded.model)


FROZEN = {"policy": "prhs:block=1,freeze_from=1,freeze_keep=0.25", "budget": "100%"}


def prefilled(model, **fields):
    """Logits after a prompt and the keys and values of every layer."""
    with OffloadCache(model.config, RuntimeConfig(**(BASE | fields))) as cache:
        logits = prefill(model, cache, ids()[:, :N_PROMPT])
        return logits, keys_and_values(cache)


@pytest.mark.parametrize("what", ["hidden", "kv"])
def test_what_freezes_nothing_changes_nothing(model, what):
    logits, plain = prefilled(model)
    for options in (f"freeze={what},freeze_from=1,freeze_keep=1", f"freeze={what},freeze_from=99"):
        given, state = prefilled(model, policy=f"prhs:block=1,{options}")
        assert torch.equal(given, logits)
        assert all(torch.equal(a, b) for a, b in zip(state, plain, strict=True))


def test_shared_keys_and_values_are_the_first_layers(model):
    _, plain = prefilled(model)
    logits, state = prefilled(model, policy="prhs:block=1,freeze=kv,freeze_from=1,freeze_keep=0.25")
    n_layers = len(state) // 2
    for layer in range(1, n_layers):
        n_frozen = int((1 - 0.25 ** (layer / (n_layers - 1))) * N_PROMPT)
        for i in range(2):
            assert torch.equal(state[2 * layer + i][:, :n_frozen], plain[i][:, :n_frozen])
            assert not torch.allclose(state[2 * layer + i][:, n_frozen:], plain[i][:, n_frozen:], atol=1e-3)
    assert not torch.allclose(logits, prefilled(model)[0], atol=1e-4)


def test_frozen_states_give_later_layers_keys_of_their_own(model):
    _, plain = prefilled(model)
    logits, state = prefilled(model, policy="prhs:block=1,freeze=hidden,freeze_from=1,freeze_keep=0.25")
    assert torch.equal(state[0], plain[0])
    last = len(state) - 2
    assert not torch.allclose(state[last][:, :8], plain[0][:, :8], atol=1e-3)
    assert not torch.allclose(state[last], plain[last], atol=1e-4)
    assert not torch.allclose(logits, prefilled(model)[0], atol=1e-4)


def test_a_sweep_refuses_what_changes_the_prefill_that_its_cells_share(loaded):
    source = RuntimeConfig(**BASE)
    config = RuntimeConfig(**(BASE | FROZEN))
    with OffloadCache(loaded.model.config, source) as one, OffloadCache(loaded.model.config, config) as other:
        prefill(loaded.model, one, ids()[:, :N_PROMPT])
        with pytest.raises(UsageError, match="freeze"):
            other.copy_prefill(one)


CPE = "prhs:block=8,tau=-1,hits=0.2,window_from=2,window_keep=0.36,freeze=kv,freeze_from=2,freeze_keep=0.36"


def watch_pages(layer):
    """The (row, page) pairs of each step's request from now on."""
    found, start = [], layer.fetch.start

    def note_and_start(selection):
        found.append(set(zip(selection.row_ids.tolist(), selection.page_ids.tolist(), strict=True)))
        return start(selection)

    layer.fetch.start = note_and_start
    return found


def run_session(loaded, n_new, **fields):
    """The pages that each layer reads in each step of a session, all keys behind it, and the share of scorings."""
    with Runtime(loaded, RuntimeConfig(**(BASE | {"budget": "20%", "pool": "none"} | fields))).session() as session:
        session.prefill(ids()[0, :N_PROMPT].tolist())
        pages = [watch_pages(layer) for layer in session.cache.offloaded]
        for token in ids()[0, N_PROMPT : N_PROMPT + n_new].tolist():
            assert session.step(token).isfinite().all()
        return pages, keys_and_values(session.cache)[::2], session.stats().scored_share


def test_the_parts_of_prhs_work_together_and_each_is_seen(loaded):
    """CPE = CIS + PSAW + ETF over a block of eight steps. Behind the second of four layers, the third leaves out and
    freezes the first .4 of all tokens (1 - .36^(1/2)), the last one .64."""
    (plain, free, scored), (mine, frozen, scored_here) = (run_session(loaded, 8, **f) for f in ({}, {"policy": CPE}))
    assert (scored, scored_here) == (1, 1 / 8)
    dilated = 0
    for place, left_out in enumerate((0, 0, 0.4, 0.64)):
        for i, pages in enumerate(mine[place]):
            assert all(page >= (int(left_out * (N_PROMPT + i + 1)) - 4) // 4 for _, page in pages)
            new = pages - mine[place][0]
            assert all({(row, page - 1), (row, page + 1)} & mine[place][0] for row, page in new)
            dilated += len(new) if place < 2 else 0  # the others also fill up what the window has left
        shared = int(left_out * N_PROMPT)
        assert torch.equal(frozen[place][:, :shared], frozen[1][:, :shared])
        if place >= 2:
            assert not torch.allclose(free[place][:, :shared], free[1][:, :shared], atol=1e-3)
            assert not torch.allclose(frozen[place][:, shared:N_PROMPT], frozen[1][:, shared:N_PROMPT], atol=1e-3)
    assert dilated > 0
    for place in (2, 3):
        assert min(page for _, page in plain[place][0]) < min(page for _, page in mine[place][0])
    assert mine[0][0] == plain[0][0]
