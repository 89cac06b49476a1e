"""Slot assignment against a least-recently-used cache in plain Python."""

import pytest
import torch
from kvoffload_kernels.cache_slots.reference import Hits, assign_slots


class PlainLru:
    """Time of last use per resident key; a miss throws out the key used longest ago, and never one wanted now."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots, self.used = n_slots, {}

    def step(self, wanted: list[int], now: int) -> set[int]:
        hits = {key for key in wanted if key in self.used}
        self.used |= dict.fromkeys(hits, now)
        for key in [key for key in wanted if key not in hits]:
            if len(self.used) == self.n_slots:
                oldest = min(self.used.values())
                assert oldest < now
                self.used = self._without_one(oldest)
            self.used[key] = now
        return hits

    def _without_one(self, age: int) -> dict[int, int]:
        victim = next(key for key, used in self.used.items() if used == age)
        return {key: used for key, used in self.used.items() if key != victim}


def trace(n_steps, n_keys, most, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        n = int(torch.randint(0, most + 1, (), generator=generator))
        yield torch.randperm(n_keys, generator=generator)[:n]


def empty(n_slots):
    return torch.full((n_slots,), -1), torch.zeros(n_slots, dtype=torch.int64)


@pytest.mark.parametrize("seed", range(5))
def test_one_page_at_a_time_is_exactly_least_recently_used(seed):
    lru, (owners, last_used) = PlainLru(4), empty(4)
    for now, wanted in enumerate(trace(300, 9, 1, seed), start=1):
        _, hit, _ = assign_slots(wanted, owners, last_used, torch.tensor(now - 1))
        assert set(wanted[hit].tolist()) == lru.step(wanted.tolist(), now)
        assert set(owners[owners >= 0].tolist()) == set(lru.used)


@pytest.mark.parametrize(("n_slots", "n_keys", "most"), [(8, 20, 8), (7, 7, 3), (16, 40, 5), (1, 3, 1)])
def test_ages_of_what_stays_are_those_of_the_plain_cache(n_slots, n_keys, most):
    """Among pages used in the same step any may go, so ages are compared, and what stays is taken over."""
    lru, (owners, last_used) = PlainLru(n_slots), empty(n_slots)
    for now, wanted in enumerate(trace(200, n_keys, most, n_slots), start=1):
        _, hit, _ = assign_slots(wanted, owners, last_used, torch.tensor(now - 1))
        assert set(wanted[hit].tolist()) == lru.step(wanted.tolist(), now)
        resident = {int(key): int(age) for key, age in zip(owners, last_used, strict=True) if key >= 0}
        assert sorted(resident.values()) == sorted(lru.used.values())
        lru.used = resident


@pytest.mark.parametrize("seed", range(3))
def test_every_wanted_page_gets_a_slot_of_its_own_and_owns_it(seed):
    owners, last_used = empty(8)
    for now, wanted in enumerate(trace(100, 30, 8, seed), start=1):
        before = owners.clone()
        slots, hit, _ = assign_slots(wanted, owners, last_used, torch.tensor(now - 1))
        assert len(set(slots.tolist())) == len(wanted)
        assert torch.equal(owners[slots], wanted)
        assert torch.equal(before[slots[hit]], wanted[hit])
        untouched = torch.ones(8, dtype=torch.bool).index_fill_(0, slots, False)
        assert torch.equal(owners[untouched], before[untouched])


@pytest.mark.parametrize(("n_slots", "n_keys", "most"), [(8, 20, 8), (7, 7, 3), (150, 300, 40), (1, 3, 1)])
def test_the_kernel_gives_the_slots_that_the_reference_gives(n_slots, n_keys, most, monkeypatch):
    """Step by step, with ties in age, empty slots, keys that want nothing, and chunks smaller than what is wanted."""
    kernel = pytest.importorskip("kvoffload_kernels.cache_slots.kernel", exc_type=ImportError)
    monkeypatch.setattr(kernel, "_CHUNK", 16)
    expected, given = empty(n_slots), empty(n_slots)
    times, counts = torch.zeros(2, dtype=torch.int64).unbind(), torch.zeros(2, 2, dtype=torch.int64)
    for now, wanted in enumerate(trace(15, n_keys, most, n_slots), start=1):
        wanted[::3] = -1
        one = assign_slots(wanted, *expected, times[0], Hits(*counts[0], 100))
        other = kernel.assign_slots(wanted, *given, times[1], Hits(*counts[1], 100))
        for a, b in zip([*one, *expected, *counts[0]], [*other, *given, *counts[1]], strict=True):
            assert torch.equal(a, b)
        assert times[0] == times[1] == now
    assert counts[0][1] == 100 * counts[0][0]


def test_keys_below_zero_want_nothing():
    with_gaps, without = empty(8), empty(8)
    for now, wanted in enumerate(trace(100, 30, 8, 0), start=1):
        gaps = torch.full((2 * len(wanted) + 1,), -1)
        gaps[1::2] = wanted
        slots, hit, missed = assign_slots(gaps, *with_gaps, torch.tensor(now - 1))
        expected = assign_slots(wanted, *without, torch.tensor(now - 1))
        assert (slots[::2] == 8).all()
        assert not hit[::2].any()
        for a, b in zip([slots[1::2], hit[1::2], missed[1::2], *with_gaps], [*expected, *without], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(missed, (gaps >= 0) & ~hit)


def test_what_stays_does_not_depend_on_the_order_of_what_is_wanted():
    forward, backward = empty(8), empty(8)
    for now, wanted in enumerate(trace(100, 30, 8, 1), start=1):
        assign_slots(wanted, *forward, torch.tensor(now - 1))
        assign_slots(wanted.flip(0), *backward, torch.tensor(now - 1))
        assert set(forward[0].tolist()) == set(backward[0].tolist())
