"""Tilted sums and their removal against sums over tokens, one by one."""

import torch
from kvoffload_kernels.completion.reference import remove_slices, tilted_sums
from torch.testing import assert_close


def test_sums_are_over_the_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(3, 5, 4, generator=generator), torch.randn(3, 5, 2, generator=generator)
    log_weight = torch.randn(3, 5, generator=generator)
    log_weight[1, 2:] = -torch.inf
    for i, sums in enumerate(tilted_sums(keys, values, log_weight)):
        weights = log_weight[i].double().exp()
        expected = [weights.sum()[None]] + [
            sum(w * x.double() for w, x in zip(weights, t[i], strict=True)) for t in (keys, values)
        ]
        assert_close(sums, torch.cat(expected).float(), atol=1e-5, rtol=1e-5)


def test_a_page_without_a_token_sums_to_zero():
    assert not tilted_sums(torch.ones(4, 3), torch.ones(4, 2), torch.full((4,), -torch.inf)).any()


def test_slices_leave_their_own_row_and_segment():
    generator = torch.Generator().manual_seed(0)
    state, sums = torch.randn(3, 4, 5, generator=generator), torch.randn(6, 5, generator=generator)
    rows, segments = torch.tensor([0, 0, 2, 2, 2, 1]), torch.tensor([3, 3, 0, 1, 0, 2])
    before, expected = state.clone(), state.clone()
    for f in range(6):
        expected[rows[f], segments[f]] -= sums[f]
    assert_close(remove_slices(state, sums, rows, segments), expected)
    assert torch.equal(state, before)


def test_removing_nothing_gives_the_state_back():
    state, none = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(0, dtype=torch.int64)
    assert torch.equal(remove_slices(state, torch.zeros(0, 4), none, none), state)
