"""RefreshKV on one layer: full steps, the partial cache between them, and what the gate does."""

import pytest
import torch
from heads import geometry
from streams import filled, pairs_of, steps, stream, watch_selections
from torch.testing import assert_close

N_PROMPT, N_NEW, STRIDE = 300, 41, 5


def run(policy, rho=0.97, given=None, n=N_NEW, **fields):
    shape = geometry()
    given = stream(shape, N_PROMPT + n, rho=rho) if given is None else given
    layer = filled(shape, given, N_PROMPT, **({"completion": "none", "budget": "15%", "policy": policy} | fields))
    return steps(layer, given, N_PROMPT, n), layer


def dense(given, n=N_NEW):
    query, keys, values = given
    found = []
    for i in range(N_PROMPT, N_PROMPT + n):
        logits = torch.einsum("grd,gnd->grn", query[:, :, i], keys[:, : i + 1])
        found.append(torch.cat([logits.softmax(-1) @ values[:, : i + 1], logits.logsumexp(-1)[..., None]], -1))
    return torch.stack(found)


def test_a_gate_that_nothing_passes_is_dense_at_every_check():
    given, layer = run(f"refresh:stride={STRIDE},cosine=1")
    assert layer.reading.n_full == 1 + (N_NEW - 1) // STRIDE
    expected = dense(stream(geometry(), N_PROMPT + N_NEW))
    assert_close(given[::STRIDE], expected[::STRIDE], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(given[1], expected[1], atol=1e-3)


def test_a_gate_that_all_pass_keeps_the_first_steps_pages_for_good():
    given = stream(geometry(), N_PROMPT + N_NEW, rho=0.0)
    layer = filled(geometry(), given, N_PROMPT, completion="none", policy="refresh:cosine=-1")
    seen = watch_selections(layer)
    steps(layer, given, N_PROMPT, N_NEW)
    assert layer.reading.n_full == 1
    assert len({frozenset(pairs_of(s)) for s in seen}) == 1


def test_the_partial_cache_is_what_the_full_step_weighed_most():
    given = stream(geometry(), N_PROMPT + 2)
    layer = filled(geometry(), given, N_PROMPT, completion="none", policy="refresh")
    seen = watch_selections(layer)
    steps(layer, given, N_PROMPT, 2)
    query, keys, _ = given
    logits = torch.einsum("grd,gnd->grn", query[:, :, N_PROMPT], keys[:, : N_PROMPT + 1])
    weights = logits.softmax(-1).amax(1)[:, 4 : 4 + layer.n_pages * 4].unflatten(1, (-1, 4)).amax(-1)
    k = layer.budget(N_PROMPT + 1) // 2
    expected = {(row, p) for row in range(2) for p in weights[row].topk(k).indices.tolist()}
    assert pairs_of(seen[0]) == expected


def test_full_steps_are_fewer_where_queries_are_smooth():
    counts = [run("refresh:stride=1,cosine=0.95", rho=rho)[1].reading.n_full for rho in (0.5, 0.97, 1.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == N_NEW > counts[1] > counts[2] == 1


def test_a_needle_that_is_asked_for_late_is_found_after_a_full_step():
    """Nothing is evicted for good: a set that is never refreshed does not find it."""
    query, keys, values = stream(geometry(), N_PROMPT + N_NEW, rho=1.0)
    query, keys, values = query.clone(), keys.clone(), values.clone()
    late = N_PROMPT + 12
    query[:, :, late:] = (
        torch.nn.functional.normalize(torch.randn(8, generator=torch.Generator().manual_seed(9)), dim=0) * 4
    )
    keys[:, 77], values[:, 77] = query[:, 0, -1] * 1.5, 7.0
    refreshed, _ = run("refresh:stride=5", given=(query, keys, values))
    static, _ = run("refresh:stride=5,cosine=-1", given=(query, keys, values))
    assert (refreshed[-1][..., :-1] > 5).all()
    assert (static[-1][..., :-1] < 5).all()


def test_refreshing_the_partial_cache_helps_and_more_checks_help_more():
    expected = dense(stream(geometry(), N_PROMPT + N_NEW, rho=0.9))
    partial = [i for i in range(1, N_NEW) if i % 20 and i % 5]  # no full step in any of them
    errors = []
    for options in ("stride=5,cosine=1", "stride=20,cosine=1", "cosine=-1"):
        given, _ = run(f"refresh:{options}", rho=0.9)
        errors.append(float((given - expected)[partial].norm()))
    assert errors[0] < errors[1] < errors[2]


def test_a_completion_on_partial_steps_is_an_improvement():
    expected = dense(stream(geometry(), N_PROMPT + N_NEW))
    errors = [float((run("refresh", completion=c)[0] - expected)[..., :-1].norm()) for c in ("pages", "none")]
    assert errors[0] < errors[1]


def test_full_reads_are_counted_as_reads():
    _, layer = run(f"refresh:stride={STRIDE},cosine=1")
    moved = layer.fetch.decode.total().cpu - layer.fetch.n_asked * layer.geometry.slice_bytes
    per_step = [(N_PROMPT + i + 1 - 12) // 4 * layer.store.shape.page_bytes for i in range(0, N_NEW, STRIDE)]
    assert moved == sum(per_step)


@pytest.mark.parametrize("mass", [0.5, 2.0])
def test_dropped_mass_that_adds_up_makes_a_full_step(mass):
    _, rare = run("refresh:cosine=-1", completion="pages")
    _, often = run(f"refresh:cosine=-1,mass={mass}", completion="pages")
    assert often.reading.n_full > rare.reading.n_full == 1
