"""Slot assignment against a least-recently-used cache in plain Python."""

import pytest
import torch
from kvoffload_kernels.cache_slots.reference import Hits, Table, assign_slots


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


def empty(n_slots, n_keys=40):
    return Table.empty(n_slots, n_keys, torch.device("cpu"))


def states(table):
    """All of it that means something."""
    return *table[:3], table.slot_of[:-1]


@pytest.mark.parametrize("seed", range(5))
def test_one_page_at_a_time_is_exactly_least_recently_used(seed):
    lru, table = PlainLru(4), empty(4)
    for now, wanted in enumerate(trace(300, 9, 1, seed), start=1):
        _, hit, _ = assign_slots(wanted, table)
        assert set(wanted[hit].tolist()) == lru.step(wanted.tolist(), now)
        assert set(table.owners[table.owners >= 0].tolist()) == set(lru.used)


@pytest.mark.parametrize(("n_slots", "n_keys", "most"), [(8, 20, 8), (7, 7, 3), (16, 40, 5), (1, 3, 1)])
def test_ages_of_what_stays_are_those_of_the_plain_cache(n_slots, n_keys, most):
    """Among pages used in the same step any may go, so ages are compared, and what stays is taken over."""
    lru, table = PlainLru(n_slots), empty(n_slots)
    for now, wanted in enumerate(trace(200, n_keys, most, n_slots), start=1):
        _, hit, _ = assign_slots(wanted, table)
        assert set(wanted[hit].tolist()) == lru.step(wanted.tolist(), now)
        resident = {int(key): int(age) for key, age in zip(*table[:2], strict=True) if key >= 0}
        assert sorted(resident.values()) == sorted(lru.used.values())
        lru.used = resident


@pytest.mark.parametrize("seed", range(3))
def test_every_wanted_page_gets_a_slot_of_its_own_and_owns_it(seed):
    table = empty(8)
    for wanted in trace(100, 30, 8, seed):
        before = table.owners.clone()
        slots, hit, _ = assign_slots(wanted, table)
        assert len(set(slots.tolist())) == len(wanted)
        assert torch.equal(table.owners[slots], wanted)
        assert torch.equal(table.slot_of[wanted].long(), slots)
        assert torch.equal(before[slots[hit]], wanted[hit])
        untouched = torch.ones(8, dtype=torch.bool).index_fill_(0, slots, False)
        assert torch.equal(table.owners[untouched], before[untouched])


@pytest.mark.parametrize("block", [64, 4096])
@pytest.mark.parametrize("gaps", [True, False])
@pytest.mark.parametrize(
    ("n_slots", "n_keys", "most"), [(8, 20, 8), (7, 7, 3), (150, 300, 40), (1, 3, 1), (64, 500, 64), (150, 400, 150)]
)
def test_the_kernel_gives_the_slots_that_the_reference_gives(n_slots, n_keys, most, gaps, block, monkeypatch):
    """Step by step, with ties in age, empty slots, keys that want nothing, and less at a time than there is."""
    kernel = pytest.importorskip("kvoffload_kernels.cache_slots.kernel", exc_type=ImportError)
    monkeypatch.setattr(kernel, "_CHUNK", 16)
    monkeypatch.setattr(kernel, "_BLOCK", block)
    expected, given = empty(n_slots, n_keys), empty(n_slots, n_keys)
    counts = torch.zeros(2, 2, dtype=torch.int64)
    for now, wanted in enumerate(trace(25, n_keys, most, n_slots), start=1):
        if gaps:
            wanted[::3] = -1
        one = assign_slots(wanted, expected, Hits(*counts[0], 100))
        other = kernel.assign_slots(wanted, given, Hits(*counts[1], 100))
        for a, b in zip([*one, *states(expected), *counts[0]], [*other, *states(given), *counts[1]], strict=True):
            assert torch.equal(a, b)
        assert given.now == now
    assert counts[0][1] == 100 * counts[0][0]


def test_a_victim_is_none_of_the_steps_own_and_no_younger_than_what_stays():
    kernel = pytest.importorskip("kvoffload_kernels.cache_slots.kernel", exc_type=ImportError)
    table, n_victims = empty(50, 200), 0
    for wanted in trace(60, 200, 30, 2):
        before = Table(*(t.clone() for t in table))
        slots, hit, missed = kernel.assign_slots(wanted, table)
        gone = torch.zeros(50, dtype=torch.bool).index_fill_(0, slots[missed], True)
        assert not gone[slots[hit]].any()
        stays = torch.ones(50, dtype=torch.bool).index_fill_(0, slots, False)
        if gone.any() and stays.any():
            assert before.last_used[gone].max() <= before.last_used[stays].min()
        n_victims += int((before.owners[gone] >= 0).sum())
    assert n_victims > 100


def test_late_steps_and_large_keys_are_told_apart():
    """Ages that are far from each other, and the largest keys that there are, with an empty slot among them."""
    kernel = pytest.importorskip("kvoffload_kernels.cache_slots.kernel", exc_type=ImportError)
    n_keys, late = 1 << 20, 1 << 40
    owners = torch.tensor([n_keys - 1, -1, 5, n_keys - 2, 0, 7])
    last_used = torch.tensor([late, 0, 3, late, late - 1, late + 5])
    for n in range(1, 7):
        for assign in (assign_slots, kernel.assign_slots):
            table = empty(6, n_keys)
            for state, value in zip(table, (owners, last_used, torch.tensor(late + 9)), strict=False):
                state.copy_(value)
            slots, _, missed = assign(100 + torch.arange(n), table)
            assert missed.all()
            assert slots.tolist() == sorted([1, 2, 4, 3, 0, 5][:n])


def test_keys_below_zero_want_nothing():
    with_gaps, without = empty(8), empty(8)
    for wanted in trace(100, 30, 8, 0):
        gaps = torch.full((2 * len(wanted) + 1,), -1)
        gaps[1::2] = wanted
        slots, hit, missed = assign_slots(gaps, with_gaps)
        expected = assign_slots(wanted, without)
        assert (slots[::2] == 8).all()
        assert not hit[::2].any()
        given = slots[1::2], hit[1::2], missed[1::2]
        for a, b in zip([*given, *states(with_gaps)], [*expected, *states(without)], strict=True):
            assert torch.equal(a, b)
        assert torch.equal(missed, (gaps >= 0) & ~hit)


def test_what_stays_does_not_depend_on_the_order_of_what_is_wanted():
    forward, backward = empty(8), empty(8)
    for wanted in trace(100, 30, 8, 1):
        assign_slots(wanted, forward)
        assign_slots(wanted.flip(0), backward)
        assert set(forward.owners.tolist()) == set(backward.owners.tolist())
