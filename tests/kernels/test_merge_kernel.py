"""Identities of the merge: it is the softmax over the union, and empty partials change no bit."""

import pytest
import torch
from kvoffload_kernels.dense_attention.reference import weigh
from kvoffload_kernels.merge import reference
from kvoffload_kernels.merge.reference import merge
from torch.testing import assert_close

kernel = pytest.importorskip("kvoffload_kernels.merge.kernel", exc_type=ImportError)
TWINS = pytest.mark.parametrize("twin", [reference, kernel], ids=["reference", "triton"])


def some(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, n, generator=generator), torch.randn(3, n, 5, generator=generator)


def test_two_disjoint_sets_merge_to_the_softmax_over_both():
    (logits_a, values_a), (logits_b, values_b) = some(4, 0), some(9, 1)
    given = merge(*weigh(logits_a, values_a), *weigh(logits_b, values_b))
    logits, values = torch.cat([logits_a, logits_b], -1).double(), torch.cat([values_a, values_b], 1).double()
    assert_close(
        given, ((logits.softmax(-1) @ values).float(), logits.exp().sum(-1).log().float()), atol=1e-5, rtol=1e-5
    )


def test_an_empty_partial_changes_no_bit_on_either_side():
    full = weigh(*some(6, 0))
    empty = torch.zeros_like(full[0]), torch.full_like(full[1], -torch.inf)
    for given in (merge(*full, *empty), merge(*empty, *full)):
        assert torch.equal(given[0], full[0])
        assert torch.equal(given[1], full[1])


def test_two_empty_partials_stay_empty():
    empty = torch.zeros(3, 2, 5), torch.full((3, 2), -torch.inf)
    output, lse = merge(*empty, *empty)
    assert not output.any()
    assert lse.isneginf().all()


def test_order_and_grouping_do_not_matter():
    a, b, c = (weigh(*some(n, n)) for n in (3, 4, 5))
    left, right, turned = merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c)), merge(*c, *merge(*b, *a))
    assert_close(left, right, atol=1e-6, rtol=1e-5)
    assert_close(left, turned, atol=1e-6, rtol=1e-5)


def test_masses_far_beyond_exp_merge_without_overflow():
    output = torch.tensor([[1.0], [2.0]])
    given, lse = merge(output, torch.tensor([900.0, -900.0]), 3 * output, torch.tensor([900.0, -900.0]))
    assert_close(given, 2 * output, atol=0, rtol=1e-4)  # fp32 holds a log-sum-exp of 900 to 6e-5
    assert_close(lse, torch.tensor([900.0, -900.0]) + torch.log(torch.tensor(2.0)))


@TWINS
@pytest.mark.parametrize("n_parts", [2, 3, 4])
def test_several_partials_merge_to_the_softmax_over_all(twin, n_parts):
    parts = [some(n, n) for n in (4, 9, 1, 6)[:n_parts]]
    outputs, lses = zip(*(weigh(*part) for part in parts), strict=True)
    logits, values = torch.cat([p[0] for p in parts], -1).double(), torch.cat([p[1] for p in parts], 1).double()
    expected = (logits.softmax(-1) @ values).float(), logits.exp().sum(-1).log().float()
    assert_close(twin.merge_parts(outputs, lses), expected, atol=1e-5, rtol=1e-5)


@TWINS
def test_empty_partials_leave_the_only_other_one_as_it_is(twin):
    output, lse = weigh(*some(6, 0))
    lse[1] = -torch.inf  # here all of them are empty
    output[1] = 0
    empty = torch.zeros_like(output), torch.full_like(lse, -torch.inf)
    given = twin.merge_parts([empty[0], output, empty[0]], [empty[1], lse, empty[1]])
    assert torch.equal(given[0], output)
    assert torch.equal(given[1], lse)


@TWINS
@pytest.mark.parametrize("n_splits", [1, 3, 37])
def test_splits_merge_to_the_softmax_over_all(twin, n_splits):
    generator = torch.Generator().manual_seed(n_splits)
    logits = 5 * torch.randn(2, n_splits, 3, 4, generator=generator)
    values = torch.randn(2, n_splits, 4, 96, generator=generator)
    logits[0, :, 1] = -torch.inf
    logits[1, 0] = -torch.inf
    outputs, lses = weigh(logits, values)
    output, lse = twin.merge_splits(outputs, lses)
    all_logits, all_values = logits.transpose(1, 2).flatten(2).double(), values.flatten(1, 2).double()
    there = ~all_logits.isneginf().all(-1)
    assert_close(lse, all_logits.logsumexp(-1).float(), atol=1e-5, rtol=1e-5)
    assert_close(output[there], (all_logits.softmax(-1) @ all_values)[there].float(), atol=1e-5, rtol=1e-5)
    assert not output[~there].any()
