"""What is said about heads is the truth: against a plain softmax over all keys."""

import pytest
import torch
from layers import geometry, new_layer, step, take_in, tokens
from torch.testing import assert_close

from kvoffload.evaluation.observed import ObservedCompletion

N, NEW = 60, 3


def watch(**fields):
    """A layer that has decoded the last tokens in one forward, its watcher, and its inputs."""
    shape = geometry(n_sequences=2)
    query, keys, values = tokens(shape, N)
    layer = new_layer(shape, **fields)
    take_in(layer, query[:, :, : N - NEW], keys[:, : N - NEW], values[:, : N - NEW])
    watched = ObservedCompletion(layer)
    layer.completion = watched
    outputs = [step(layer, query, keys, values, slice(i, i + 1)) for i in range(N - NEW, N)]
    return watched.means(), torch.cat(outputs, 2)[..., :-1], (query, keys, values)


def softmax(inputs):
    """Weights [rows, R, Q, N] and outputs of the last queries, as dense attention has them."""
    query, keys, values = inputs
    logits = query[:, :, N - NEW :] @ keys[:, None].transpose(-1, -2)
    seen = torch.arange(N) <= torch.arange(N - NEW, N)[:, None]
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return weights, weights @ values[:, None]


def test_entropy_is_that_of_dense_attention():
    means, _, inputs = watch(completion="none")
    weights, _ = softmax(inputs)
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean(-1)
    assert_close(means["entropy"].float(), entropy, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("completion", ["none", "anchored", "pages"])
def test_the_error_is_that_of_what_was_given(completion):
    means, given, inputs = watch(completion=completion)
    _, expected = softmax(inputs)
    error = ((given - expected).norm(dim=-1) / expected.norm(dim=-1)).mean(-1)
    assert_close(means["error"].float(), error, atol=1e-4, rtol=1e-4)
    assert (means["error"] > 0.01).any()


def test_without_a_completion_both_errors_are_one_and_no_mass_is_estimated():
    means, _, _ = watch(completion="none")
    assert_close(means["error"], means["selection_error"])
    assert means["mass_error"].isnan().all()


def test_the_exact_completion_has_no_error():
    means, _, _ = watch(completion="exact")
    assert means["error"].max() < 1e-5
    assert means["mass_error"].max() < 1e-4
    assert means["selection_error"].max() > 0.01


def test_nothing_remains_of_a_full_budget():
    means, _, _ = watch(completion="anchored", budget="100%")
    assert means["remainder"].max() == 0
    assert means["error"].max() < 1e-5


def test_several_queries_a_forward_are_single_steps():
    shape = geometry()
    query, keys, values = tokens(shape, N)
    found = []
    for runs in ([slice(56, 59)], [slice(i, i + 1) for i in range(56, 59)]):
        layer = new_layer(shape, completion="anchored")
        take_in(layer, query[:, :, :56], keys[:, :56], values[:, :56])
        layer.completion = watched = ObservedCompletion(layer)
        assert layer.run_length(3) == 3
        for run in runs:
            step(layer, query, keys, values, run)
        found.append(watched.means())
    for name, column in found[0].items():
        assert_close(column, found[1][name], atol=1e-5, rtol=1e-5)
