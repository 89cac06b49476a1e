"""Accuracy mode and its audit, on one layer."""

import pytest
import torch
from heads import geometry
from layers import new_layer, step, take_in, tokens
from pydantic import ValidationError
from streams import filled, steps, stream

from kvoffload.config import RuntimeConfig
from kvoffload.policies.accuracy import Margin
from kvoffload.runtime.stats import Audited, capped_share

N_PROMPT, N_NEW = 300, 16
BASE = {"selector": "quantized:bits=4", "completion": "index_mass", "audit": 1}


def run(rho=0.9, shape=None, n=N_NEW, **fields):
    shape = shape or geometry()
    given = stream(shape, N_PROMPT + n, rho=rho)
    layer = filled(shape, given, N_PROMPT, **(BASE | fields))
    return steps(layer, given, N_PROMPT, n), layer


def dropped(layer):
    return torch.stack(layer.meter.dropped)  # [steps, rows, R]


def test_an_audit_is_the_mass_that_was_not_read():
    """Against dense attention in plain torch: delta = 1 - e^(lse of what was read - lse of everything)."""
    given = stream(geometry(), N_PROMPT + N_NEW, rho=0.9)
    layer = filled(geometry(), given, N_PROMPT, **(BASE | {"completion": "none"}))
    found = steps(layer, given, N_PROMPT, N_NEW)[..., -1]
    query, keys, _ = given
    for i in range(N_NEW):
        n = N_PROMPT + i + 1
        total = torch.einsum("grd,gnd->grn", query[:, :, n - 1], keys[:, :n]).logsumexp(-1)
        assert torch.allclose(dropped(layer)[i], 1 - (found[i] - total).exp(), atol=1e-5)


@pytest.mark.parametrize("policy", ["none", "prhs:tau=-1"])
def test_keeping_a_set_alone_is_off_by_exactly_the_dropped_mass(policy):
    """Total variation = delta, the audited mass; the output moves by delta (o_S - o_R), at most delta times the values'
    diameter. Values that are unit vectors make outputs the weights themselves."""
    n = 100
    shape = geometry(value_dim=n)
    query, keys, _ = stream(shape, n, rho=0.9)
    given = query, keys, torch.eye(n).expand(shape.rows, n, n)
    layer = filled(shape, given, n - 8, policy=policy, **(BASE | {"completion": "none"}))
    found = steps(layer, given, n - 8, 8)[..., :-1]
    others = torch.randn(n, 16, generator=torch.Generator().manual_seed(0))
    for i, (weights, delta) in enumerate(zip(found, dropped(layer), strict=True)):
        seen = n - 7 + i
        dense = torch.einsum("grd,gnd->grn", query[:, :, seen - 1], keys[:, :seen]).softmax(-1)
        dense = torch.nn.functional.pad(dense, (0, n - seen))
        assert torch.allclose((weights - dense).abs().sum(-1) / 2, delta, atol=1e-5)
        assert (delta > 0.01).all()
        off, rest = (weights - dense) @ others, dense.where(weights == 0, 0.0) @ others / delta[..., None]
        assert torch.allclose(off, delta[..., None] * (weights @ others - rest), atol=1e-5)
        assert (off.norm(dim=-1) <= delta * torch.cdist(others, others).max()).all()


def test_an_audit_changes_no_step_and_no_decode_read():
    (given, layer), (expected, plain) = run(), run(audit="off")
    assert torch.equal(given, expected)
    assert layer.fetch.decode.total() == plain.fetch.decode.total()
    assert layer.fetch.prefill.total().cpu > plain.fetch.prefill.total().cpu


@pytest.mark.parametrize("policy", ["none", "prhs", "tokenselect", "retro:window=3"])
@pytest.mark.parametrize("target", [0.02, 0.1, 0.3])
def test_the_dropped_mass_stays_below_the_target(target, policy):
    _, layer = run(max_dropped_mass=target, dropped_mass_cap="100%", policy=policy, budget="3%")
    held = Audited.of([layer], target)
    assert held.held >= 0.95
    assert held.mean <= target
    assert layer.fetch.decode.total().cpu > 0


def test_a_smaller_target_reads_more_and_a_loose_one_nothing_more():
    reads = [
        run(max_dropped_mass=t, dropped_mass_cap="100%", budget="3%")[1].fetch.decode.total().cpu
        for t in (0.02, 0.1, 0.999)
    ]
    plain = run(budget="3%")[1].fetch.decode.total().cpu
    assert reads[0] > reads[1] > reads[2] == plain


def test_without_need_nothing_changes():
    (given, layer), (expected, plain) = run(max_dropped_mass=0.999), run()
    assert torch.equal(given, expected)
    assert layer.meter.scored_rows == plain.meter.scored_rows


def test_reads_end_at_the_cap():
    _, layer = run(max_dropped_mass=0.001, dropped_mass_cap="30%", budget="3%")
    assert layer.fetch.n_asked <= sum(int(0.3 * (N_PROMPT + i + 1)) // 4 * 2 + 2 for i in range(N_NEW))
    assert float(dropped(layer).mean()) > 0.001


@pytest.mark.parametrize("policy", ["none", "retro:window=3", "prhs"])
@pytest.mark.parametrize("cap", ["6%", "20%", "100%"])
def test_heads_that_end_at_the_cap_above_their_target_are_counted(cap, policy):
    """The exact completion estimates what audits find: the heads and steps above the target are known."""
    fields = {"completion": "exact", "selector": "exact", "policy": policy, "budget": "3%"}
    _, layer = run(max_dropped_mass=0.2, dropped_mass_cap=cap, **fields)
    missed = int((dropped(layer).amax(-1) > 0.2).sum())
    assert layer.reading.n_capped == missed
    assert (missed == 0) == (cap == "100%")
    assert capped_share([layer]) == missed / (N_NEW * layer.geometry.rows)


def test_a_full_read_at_the_cap_is_dense():
    given, _ = run(max_dropped_mass=1e-6, dropped_mass_cap="100%", budget="3%")
    expected, _ = run(budget="100%")
    assert torch.allclose(given, expected, atol=1e-4)


def test_a_row_that_had_to_read_on_is_scored_anew_in_the_next_step():
    options = {
        "rho": 1.0,
        "selector": "exact",
        "completion": "pages",
        "policy": "prhs:tau=-1,block=16",
        "dropped_mass_cap": "100%",
        "budget": "3%",
    }
    _, loose = run(max_dropped_mass=0.999, **options)
    _, strict = run(max_dropped_mass=0.02, **options)
    assert loose.meter.scored_rows == 2
    assert strict.meter.scored_rows > 2


def test_several_queries_read_on_as_single_steps_do():
    shape = geometry()
    query, keys, values = tokens(shape, N_PROMPT + 3)
    found = []
    for longest in (1, 3):
        layer = filled(shape, (query, keys, values), N_PROMPT, **BASE, max_dropped_mass=0.05, dropped_mass_cap="100%")
        n = min(longest, layer.run_length(longest))
        parts = [step(layer, query, keys, values, slice(N_PROMPT + i, N_PROMPT + i + n)) for i in range(0, 3, n)]
        found.append(torch.cat(parts, 2))
    assert torch.allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_dropped_mass": 0.02, "completion": "none"}, "needs one completion"),
        ({"max_dropped_mass": 0.02, "gate": True}, "needs one completion"),
        ({"max_dropped_mass": 1.5}, "less than 1"),
        ({"audit": 0}, "greater than or equal to 1"),
        ({"audit": 4, "dropped_mass_misses": 0.05}, "give --max-dropped-mass"),
        ({"max_dropped_mass": 0.02, "dropped_mass_misses": 0.05}, "and --audit"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, told):
    with pytest.raises(ValidationError, match=told):
        RuntimeConfig(**fields)


def test_a_margin_settles_where_the_target_is_missed_as_often_as_allowed():
    """An estimate that is too low by a head's own factor, as audits find it."""
    generator = torch.Generator().manual_seed(0)
    too_low, margin = torch.tensor([[0.0, 0.7], [2.0, 5.0]]), Margin(0.1, 0.05)
    missed = []
    for _ in range(2000):
        real = 0.1 * (too_low + 0.3 * torch.randn(2, 2, generator=generator) - margin.added(torch.zeros(2, 2))).exp()
        missed.append(real > 0.1)
        margin.learn(real)
    assert torch.stack(missed).float().mean(0).max() <= 0.06
    assert (margin.nats.diff() > 0.3).all()


def test_audits_teach_a_bad_estimate_to_hold_the_target():
    """A mean key has at most the mean mass, so means of pages underestimate."""
    held = []
    for misses in ("off", 0.05):
        fields = {"max_dropped_mass": 0.05, "dropped_mass_cap": "100%", "budget": "3%", "dropped_mass_misses": misses}
        _, layer = run(completion="page_mean", selector="exact", n=60, **fields)
        held.append(float((dropped(layer)[20:] <= 0.05).float().mean()))
    assert held[0] < 0.6
    assert held[1] > 0.85


def test_audits_that_teach_are_reads_of_the_decode():
    fields = {"max_dropped_mass": 0.999, "budget": "3%"}
    (given, plain), (same, taught) = run(**fields), run(**fields, dropped_mass_misses=0.05)
    assert torch.equal(given, same)  # nothing is missed
    audits = plain.fetch.prefill.total().cpu - taught.fetch.prefill.total().cpu
    assert taught.fetch.decode.total().cpu - plain.fetch.decode.total().cpu == audits > 0
    assert taught.run_length(8) == 1 < plain.run_length(8)


def test_padding_counts_in_no_audit():
    shape = geometry(n_sequences=2)
    layer = new_layer(shape, **BASE)
    query, keys, values = tokens(shape, N_PROMPT + 1)
    take_in(layer, query[:, :, :-1], keys[:, :-1], values[:, :-1], torch.tensor([0, 0, 30, 30]))
    found = step(layer, query, keys, values, slice(N_PROMPT, None))[:, :, 0, -1]
    assert found.isfinite().all()
    assert (dropped(layer)[0] >= 0).all()
    real = torch.arange(N_PROMPT + 1) >= 30
    logits = torch.einsum("grd,gnd->grn", query[2:, :, -1], keys[2:]).masked_fill(~real, -torch.inf)
    assert (layer.meter.dropped[0][2:] < 1).all()
    assert logits.logsumexp(-1).isfinite().all()
