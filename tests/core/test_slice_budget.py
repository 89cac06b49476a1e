"""A budget as a number of slices; here a token-equivalent is 96 bytes and a slice of four tokens 384."""

import pytest
from heads import geometry

from kvoffload.attention.build import SliceBudget
from kvoffload.units import Budget


def budget(text, *, slice_cost_bytes=384, n_layers=4, **sizes):
    return SliceBudget(Budget.parse(text), geometry(**sizes), n_layers, slice_cost_bytes)


@pytest.mark.parametrize(
    ("text", "n_tokens", "expected"),
    [
        ("10%", 1000, 50),  # 100 tokens of each of two heads, four a slice
        ("10%", 39, 1),  # 3.9 tokens of each head: 7.8 tokens, and a second slice would be more
        ("1%", 100, 0),  # one token of each head does not pay for a slice
        ("64", 1000, 32),
        ("12KiB", 1000, 8),  # 12288 bytes over four layers: 3072 each, and eight slices of 384
        ("100%", 1001, 502),  # 251 pages of two heads, the last one not full
        ("2000", 1000, 500),
        ("1GiB", 1000, 500),
        ("0%", 1000, 0),
    ],
)
def test_three_spellings_become_slices(text, n_tokens, expected):
    assert budget(text)(n_tokens) == expected


@pytest.mark.parametrize(("text", "expected"), [("10%", 100.0), ("64", 64.0), ("12KiB", 16.0)])
def test_tokens_are_per_layer_and_head(text, expected):
    assert budget(text).tokens(1000) == expected


@pytest.mark.parametrize(("cost", "expected"), [(384, 50), (1024, 18), (4096, 4), (8192, 2)])
def test_a_tier_that_reads_more_than_a_slice_gets_fewer(cost, expected):
    assert budget("10%", slice_cost_bytes=cost)(1000) == expected  # 19200 bytes over the cost, rounded down


def test_everything_is_everything_also_where_reads_are_aligned():
    assert budget("100%", slice_cost_bytes=8192)(1000) == 500


def test_a_percentage_of_a_batch_is_each_sequences_own():
    assert budget("10%", n_sequences=3)(1000) == 50


def test_bytes_a_step_are_shared_by_the_sequences_of_a_batch():
    n_layers, n_sequences = 4, 2
    slices = budget("12KiB", n_layers=n_layers, n_sequences=n_sequences)(1000)
    assert slices * n_sequences * n_layers * 384 <= 12 * 1024
