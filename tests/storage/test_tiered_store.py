"""A bounded cpu tier before files: what stays, what moves, what is late, what fails."""

from collections.abc import Iterator

import pytest
import torch
from kvoffload_storage import (
    Fault,
    FaultyStore,
    FileStore,
    LatencyStore,
    Moved,
    StorageError,
    Store,
    StoreShape,
    TieredStore,
    TracingStore,
    UnavailableError,
)
from torch import Tensor

SHAPE = StoreShape(2, 2, 4096)
PAGES = torch.randint(0, 256, (40, 2, 4096), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SLICE = SHAPE.slice_bytes


@pytest.fixture
def files() -> Iterator[FileStore]:
    store = FileStore(None, SHAPE, extent_bytes=1 << 14)
    for layer in range(2):
        store.append(layer, PAGES)
    store.flush()
    yield store
    store.close()


def tiered(inner: Store, n_slots: int, n_parts: int = 1) -> TieredStore:
    return TieredStore(inner, max_bytes=n_slots * SLICE, n_parts=n_parts)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def read(store: Store, *pages: int, layer: int = 0, piece: int = 0) -> Moved:
    """Read one slice of each page, compare it, and say what moved."""
    out = torch.zeros(len(pages), SLICE, dtype=torch.uint8)
    moved = store.read_slices(layer, ids(*pages), ids(*[piece] * len(pages)), out).wait()
    assert torch.equal(out, PAGES[list(pages), piece])
    return moved


def test_what_was_read_is_read_from_memory_again(files: FileStore) -> None:
    store = tiered(files, 10)
    assert read(store, 3, 4, 5) == Moved(nvme=3 * SLICE)
    assert read(store, 5, 3) == Moved(cpu=2 * SLICE)
    assert read(store, 5, 6) == Moved(cpu=SLICE, nvme=SLICE)
    assert read(store, 5, 6, layer=1) == Moved(nvme=2 * SLICE)
    assert read(store, 5, 6, piece=1) == Moved(nvme=2 * SLICE)


def test_the_least_recently_used_goes_first(files: FileStore) -> None:
    store = tiered(files, 4)
    for page in (0, 1, 2, 3, 0):
        read(store, page)
    read(store, 4)  # in the place of 1
    assert [read(store, page).nvme > 0 for page in (0, 2, 3, 4)] == [False] * 4
    assert read(store, 1).nvme > 0


def test_a_read_larger_than_the_tier_takes_what_fits(files: FileStore) -> None:
    store = tiered(files, 4)
    assert read(store, *range(20)) == Moved(nvme=20 * SLICE)
    assert sum(read(store, page).cpu for page in range(20)) == 4 * SLICE


def test_new_pages_go_to_free_slots_only() -> None:
    files = FileStore(None, SHAPE)
    store = tiered(files, 8)
    store.append(0, PAGES[:3])
    store.append(0, PAGES[3:])
    store.flush()
    assert [read(store, page).cpu > 0 for page in range(4)] == [True] * 4
    assert read(store, 4) == Moved(nvme=SLICE)
    store.close()


def test_what_was_asked_for_early_is_there_and_counted_once(files: FileStore) -> None:
    traced = TracingStore(files)
    store = tiered(traced, 20)
    store.ahead(0, ids(1, 2, 3, 2), ids(0, 0, 0, 0))
    store.ahead(1, ids(7), ids(0))
    moved = read(store, 1, 2, 3, 4)
    moved += store.moved_unasked(0)
    assert moved == Moved(cpu=3 * SLICE, nvme=4 * SLICE)
    read(store, 7, layer=1)
    assert store.moved_unasked(0) == Moved()
    assert traced.read.nvme == 5 * SLICE


def test_late_slices_are_named_and_land_afterwards(files: FileStore) -> None:
    slow = LatencyStore(files, 0.2)
    store = tiered(slow, 20, n_parts=4)
    read(store, 1, 2)
    out = torch.zeros(4, SLICE, dtype=torch.uint8)
    ticket = store.read_slices(0, ids(1, 8, 2, 9), ids(0, 0, 0, 0), out)
    moved, landed = ticket.settle(0.01)
    assert landed is not None
    assert landed.tolist() == [True, False, True, False]
    assert moved == Moved(cpu=2 * SLICE)
    assert torch.equal(out[[0, 2]], PAGES[[1, 2], 0])
    assert read(store, 8, 9).nvme + store.moved_unasked(0).nvme == 2 * SLICE


def test_in_time_all_rows_are_there(files: FileStore) -> None:
    store = tiered(files, 20, n_parts=4)
    out = torch.zeros(6, SLICE, dtype=torch.uint8)
    moved, landed = store.read_slices(0, ids(*range(6)), ids(*[0] * 6), out).settle(5.0)
    assert landed is None
    assert moved == Moved(nvme=6 * SLICE)
    assert torch.equal(out, PAGES[:6, 0])


def test_slots_that_a_ticket_needs_are_not_given_away(files: FileStore) -> None:
    store = tiered(files, 4)
    out = torch.zeros(4, SLICE, dtype=torch.uint8)
    ticket = store.read_slices(0, ids(0, 1, 2, 3), ids(0, 0, 0, 0), out)
    store.ahead(1, ids(5, 6), ids(0, 0))
    read(store, 20, 21)
    ticket.wait()
    assert torch.equal(out, PAGES[:4, 0])


def test_a_read_that_fails_once_is_tried_again(files: FileStore) -> None:
    faulty = FaultyStore(files, [Fault("wait", 1, error=StorageError("EIO"))])
    store = tiered(faulty, 20)
    read(store, 1, 2)
    read(store, 1, 2)


def test_a_read_that_keeps_failing_is_told_and_leaves_nothing_behind(files: FileStore) -> None:
    faults = [Fault("wait", call, error=StorageError("EIO")) for call in (1, 2)]
    store = tiered(FaultyStore(files, faults), 20)
    with pytest.raises(StorageError, match="EIO"):
        read(store, 1, 2)
    assert read(store, 1, 2) == Moved(nvme=2 * SLICE)


def test_an_early_read_that_fails_is_read_again_when_it_is_needed(files: FileStore) -> None:
    faults = [Fault("read_slices", 1, error=UnavailableError("gone")), Fault("wait", 1, error=StorageError("EIO"))]
    store = tiered(FaultyStore(files, faults), 20)
    store.ahead(0, ids(1), ids(0))
    store.ahead(0, ids(2), ids(0))
    assert store.moved_unasked(0) in (Moved(), Moved(nvme=SLICE))
    read(store, 1, 2)


def test_many_random_reads_are_right(files: FileStore) -> None:
    generator = torch.Generator().manual_seed(1)
    store = tiered(files, 13, n_parts=3)
    for _ in range(300):
        n = int(torch.randint(0, 20, (), generator=generator))
        layer = int(torch.randint(0, 2, (), generator=generator))
        pages = torch.randint(0, 40, (n,), generator=generator)
        pieces = torch.randint(0, 2, (n,), generator=generator)
        if n % 3 == 0:
            store.ahead(layer, pages, pieces)
            continue
        out = torch.zeros(n, SLICE, dtype=torch.uint8)
        ticket = store.read_slices(layer, pages, pieces, out)
        landed = ticket.settle(0.0)[1] if n % 2 else (ticket.wait(), None)[1]
        rows = torch.ones(n, dtype=torch.bool) if landed is None else torch.from_numpy(landed)
        assert torch.equal(out[rows], PAGES[pages, pieces][rows])
