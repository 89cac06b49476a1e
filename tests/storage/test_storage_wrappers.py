"""Counting, latency and faults around a store."""

import time

import pytest
import torch
from kvoffload_storage import (
    CapacityError,
    Fault,
    FaultyStore,
    FileStore,
    IntegrityError,
    LatencyStore,
    MemoryStore,
    Moved,
    StoreShape,
    TracingStore,
    cut_short,
    flip_bit,
)

SHAPE = StoreShape(1, 2, 4096)
PAGES = torch.full((4, 2, 4096), 0x41, dtype=torch.uint8)


def read_one(store: MemoryStore | TracingStore | LatencyStore | FaultyStore) -> torch.Tensor:
    out = torch.empty(1, 4096, dtype=torch.uint8)
    store.read_slices(0, torch.tensor([1]), torch.tensor([0]), out).wait()
    return out


def test_tracing_keeps_reads_and_writes_apart() -> None:
    store = TracingStore(FileStore(None, SHAPE))
    store.append(0, PAGES)
    read_one(store)
    store.flush()
    read_one(store)
    store.read_pages(0, 0, torch.empty(3, 2, 4096, dtype=torch.uint8)).wait()
    assert store.written == Moved(nvme=4 * 8192)
    assert store.read == Moved(cpu=4096, nvme=4096 + 3 * 8192)
    assert (store.slices_asked, store.pages_asked, store.pages_appended) == (2, 3, 4)
    store.reset()
    assert (store.read, store.written, store.slices_asked) == (Moved(), Moved(), 0)
    store.close()


def test_a_read_counts_when_it_is_waited_for() -> None:
    store = TracingStore(MemoryStore(SHAPE))
    store.append(0, PAGES)
    ticket = store.read_slices(0, torch.tensor([1]), torch.tensor([0]), torch.empty(1, 4096, dtype=torch.uint8))
    assert store.read == Moved()
    ticket.wait()
    assert store.read == Moved(cpu=4096)


def test_latency_counts_from_the_start_of_the_read() -> None:
    store = LatencyStore(MemoryStore(SHAPE), 0.02)
    store.append(0, PAGES)
    start = time.monotonic()
    tickets = [store.read_pages(0, 0, torch.empty(1, 2, 4096, dtype=torch.uint8)) for _ in range(3)]
    for ticket in tickets:
        ticket.wait()
    assert time.monotonic() - start >= 0.02
    assert read_one(store).eq(0x41).all()


def test_a_fault_comes_at_its_call_and_only_there() -> None:
    store = FaultyStore(MemoryStore(SHAPE), [Fault("append", 2, CapacityError("full")), Fault("flush", 1, OSError(5))])
    store.append(0, PAGES)
    with pytest.raises(CapacityError, match="full"):
        store.append(0, PAGES)
    with pytest.raises(OSError, match="5"):
        store.flush()
    store.flush()
    store.append(0, PAGES)
    assert store.n_pages(0) == 8


def test_a_read_may_fail_when_it_starts_or_when_it_is_waited_for() -> None:
    faults = [Fault("read_slices", 1, IntegrityError("start")), Fault("wait", 1, IntegrityError("end"))]
    store = FaultyStore(MemoryStore(SHAPE), faults)
    store.append(0, PAGES)
    with pytest.raises(IntegrityError, match="start"):
        read_one(store)
    with pytest.raises(IntegrityError, match="end"):
        read_one(store)
    assert read_one(store).eq(0x41).all()


def test_what_was_read_may_be_damaged() -> None:
    store = FaultyStore(MemoryStore(SHAPE), [Fault("wait", 1, damage=flip_bit), Fault("wait", 2, damage=cut_short)])
    store.append(0, PAGES)
    flipped = read_one(store)
    assert (flipped[0, 0], flipped[0, 1:].eq(0x41).all()) == (0x40, True)
    out = torch.empty(1, 2, 4096, dtype=torch.uint8)
    store.read_pages(0, 2, out).wait()
    assert out[0, 0].eq(0x41).all()
    assert out[0, 1].eq(0).all()
