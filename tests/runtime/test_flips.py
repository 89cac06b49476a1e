"""A sample of ``scripts/flip-check``."""

from collections import Counter

import pytest
from flips import Saved, flip_once


@pytest.mark.parametrize("budget", ["100%", "20%"])
def test_a_flipped_bit_never_gives_a_wrong_token(loaded, tmp_path, budget):
    saved = Saved(loaded, tmp_path, budget=budget)
    outcomes = Counter(flip_once(saved, seed) for seed in range(40))
    assert outcomes["refused"] > 5
    assert outcomes["computed again"] > 0


def test_what_follows_a_repair_is_told_from_what_follows_without_one(loaded, tmp_path):
    saved = Saved(loaded, tmp_path, budget="20%")
    assert any(saved.expected(page) != saved.expected(None) for page in range(20))
