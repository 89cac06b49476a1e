"""A sample of ``scripts/flip-check``."""

from collections import Counter

from flips import flip_once, make


def test_a_flipped_bit_never_gives_a_wrong_token(loaded, tmp_path):
    rt, path, expected = make(loaded, tmp_path)
    outcomes = Counter(flip_once(rt, path, expected, seed) for seed in range(40))
    assert outcomes["refused"] > 5
    assert outcomes["computed again"] > 0
