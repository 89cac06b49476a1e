"""The contract of ``Store``, run over every implementation and engine."""

from collections.abc import Callable, Iterator

import pytest
import torch
from kvoffload_storage import (
    CapacityError,
    FileStore,
    MemoryStore,
    Moved,
    Store,
    StoreShape,
    TieredStore,
    TracingStore,
    WrapperStore,
    aligned_empty,
    available_engines,
)
from kvoffload_storage.format import HEADER_BYTES
from torch import Tensor

ENGINES = [name for name, why_not in available_engines().items() if not why_not]
EXTENT_BYTES = 1 << 16

Build = Callable[..., Store]


def _file(**fixed: object) -> Build:
    return lambda shape, **options: FileStore(None, shape, extent_bytes=EXTENT_BYTES, **fixed, **options)


BUILDS: dict[str, Build] = {
    "memory": MemoryStore,
    "file-buffered": _file(direct="off"),
    **{f"file-{name}": _file(engine=name) for name in ENGINES},
    "tiered": lambda shape, **options: TieredStore(_file()(shape, **options), max_bytes=40 * shape.slice_bytes),
    "tiered-small": lambda shape, **options: TieredStore(_file()(shape, **options), max_bytes=3 * shape.slice_bytes),
    "tiered-none": lambda shape, **options: TieredStore(_file()(shape, **options), max_bytes=0),
    "traced-file": lambda shape, **options: TracingStore(_file()(shape, **options)),
    "wrapped-memory": lambda shape, **options: WrapperStore(MemoryStore(shape, **options)),
}
SLICE_BYTES = [48, 4096, 8192 + 512, 8192]


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest) -> Iterator[Build]:
    """Builds stores of one kind and closes them."""
    built: list[Store] = []

    def make(shape: StoreShape, **options: object) -> Store:
        built.append(BUILDS[request.param](shape, **options))
        return built[-1]

    yield make
    for store in built:
        store.close()


def pages_of(shape: StoreShape, n: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, shape.n_slices, shape.slice_bytes), dtype=torch.uint8, generator=random)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def read_slices(store: Store, layer: int, page_ids: Tensor, slice_ids: Tensor) -> tuple[Tensor, Moved]:
    out = torch.full((len(page_ids), store.shape.slice_bytes), 0xEE, dtype=torch.uint8)
    return out, store.read_slices(layer, page_ids, slice_ids, out).wait()


def read_pages(store: Store, layer: int, first: int, n: int) -> Tensor:
    out = torch.full((n, store.shape.n_slices, store.shape.slice_bytes), 0xEE, dtype=torch.uint8)
    store.read_pages(layer, first, out).wait()
    return out


@pytest.mark.parametrize("slice_bytes", SLICE_BYTES)
def test_slices_come_back_as_written_after_a_flush(build: Build, slice_bytes: int) -> None:
    shape = StoreShape(2, 3, slice_bytes)
    store, pages = build(shape), pages_of(shape, 70)
    store.append(1, pages)
    store.flush()
    page_ids, slice_ids = torch.arange(69, -1, -1), torch.arange(70) % 3
    out, _ = read_slices(store, 1, page_ids, slice_ids)
    assert torch.equal(out, pages[page_ids, slice_ids])


@pytest.mark.parametrize("slice_bytes", SLICE_BYTES)
def test_pages_come_back_as_written_over_several_extents(build: Build, slice_bytes: int) -> None:
    shape = StoreShape(1, 3, slice_bytes)
    store, pages = build(shape), pages_of(shape, 70)
    for start in range(0, 70, 9):
        store.append(0, pages[start : start + 9])
    store.flush()
    assert torch.equal(read_pages(store, 0, 5, 60), pages[5:65])


def test_a_page_can_be_read_right_after_its_append(build: Build) -> None:
    shape = StoreShape(1, 2, 4096)
    store, pages = build(shape), pages_of(shape, 40)
    for i in range(40):
        store.append(0, pages[i : i + 1])
        assert torch.equal(read_slices(store, 0, ids(i, 0), ids(1, 0))[0], torch.stack([pages[i, 1], pages[0, 0]]))


def test_the_appended_tensor_may_be_reused(build: Build) -> None:
    shape = StoreShape(1, 2, 48)
    store, pages = build(shape), pages_of(shape, 3)
    buffer = pages.clone()
    store.append(0, buffer)
    buffer.zero_()
    assert torch.equal(read_pages(store, 0, 0, 3), pages)


def test_pages_may_be_a_strided_view(build: Build) -> None:
    shape = StoreShape(1, 2, 48)
    store, pages = build(shape), pages_of(shape, 6)
    store.append(0, pages[::2])
    assert torch.equal(read_pages(store, 0, 0, 3), pages[::2])


@pytest.mark.parametrize("slice_bytes", SLICE_BYTES)
def test_repeated_slices_fill_every_row(build: Build, slice_bytes: int) -> None:
    shape = StoreShape(1, 2, slice_bytes)
    store, pages = build(shape), pages_of(shape, 4)
    store.append(0, pages)
    store.flush()
    page_ids, slice_ids = ids(3, 1, 3, 3, 1, 0), ids(1, 0, 1, 0, 0, 1)
    out, _ = read_slices(store, 0, page_ids, slice_ids)
    assert torch.equal(out, pages[page_ids, slice_ids])


def test_rows_partly_in_memory_and_partly_on_disk_are_filled(build: Build) -> None:
    shape = StoreShape(1, 2, 8192)
    store, pages = build(shape), pages_of(shape, 6)
    store.append(0, pages[:3])
    store.flush()
    store.append(0, pages[3:])
    page_ids, slice_ids = ids(5, 0, 3, 2, 5, 0, 4), ids(0, 1, 1, 0, 0, 1, 1)
    out, _ = read_slices(store, 0, page_ids, slice_ids)
    assert torch.equal(out, pages[page_ids, slice_ids])


def test_aligned_rows_are_read_as_well_as_unaligned_ones(build: Build) -> None:
    shape = StoreShape(1, 2, 8192)
    store, pages = build(shape), pages_of(shape, 8)
    store.append(0, pages)
    store.flush()
    page_ids, slice_ids = ids(7, 2, 2, 3), ids(0, 0, 1, 1)
    for memory in (aligned_empty(4 * 8192), aligned_empty(4 * 8192 + 8)[8:]):
        out = memory.view(4, 8192)
        store.read_slices(0, page_ids, slice_ids, out).wait()
        assert torch.equal(out, pages[page_ids, slice_ids])


def test_empty_appends_and_reads_do_nothing(build: Build) -> None:
    shape = StoreShape(1, 2, 48)
    store = build(shape)
    assert store.append(0, pages_of(shape, 0)) == Moved()
    assert store.n_pages(0) == 0
    assert read_slices(store, 0, ids(), ids())[1] == Moved()
    assert store.read_pages(0, 0, pages_of(shape, 0)).wait() == Moved()
    store.flush()


def test_layers_count_their_own_pages(build: Build) -> None:
    shape = StoreShape(3, 2, 48)
    store = build(shape)
    store.append(0, pages_of(shape, 2, seed=1))
    store.append(2, pages_of(shape, 5, seed=2))
    assert [store.n_pages(layer) for layer in range(3)] == [2, 0, 5]
    assert torch.equal(read_pages(store, 2, 0, 5), pages_of(shape, 5, seed=2))
    assert torch.equal(read_pages(store, 0, 0, 2), pages_of(shape, 2, seed=1))


def test_a_layer_grows_over_its_capacity(build: Build) -> None:
    shape = StoreShape(2, 2, 4096)
    store, pages = build(shape, capacity_pages=3), pages_of(shape, 30)
    for start in range(0, 30, 5):
        store.append(1, pages[start : start + 5])
    store.flush()
    assert torch.equal(read_pages(store, 1, 0, 30), pages)


def test_a_full_store_keeps_the_pages_it_has(build: Build) -> None:
    shape = StoreShape(1, 2, 4096)
    store, pages = build(shape, max_bytes=5 * 8192 + HEADER_BYTES), pages_of(shape, 4)
    store.append(0, pages)
    with pytest.raises(CapacityError, match="45,056"):
        store.append(0, pages_of(shape, 2))
    store.append(0, pages_of(shape, 1, seed=9))
    assert store.n_pages(0) == 5
    assert torch.equal(read_pages(store, 0, 0, 4), pages)


def test_a_capacity_over_the_cap_is_refused_at_once(build: Build) -> None:
    with pytest.raises(CapacityError, match="cap is 1,000"):
        build(StoreShape(2, 2, 4096), capacity_pages=1, max_bytes=1000)


def test_tickets_of_several_layers_may_be_in_flight_together(build: Build) -> None:
    shape = StoreShape(4, 2, 4096)
    store = build(shape)
    for layer in range(4):
        store.append(layer, pages_of(shape, 20, seed=layer))
    store.flush()
    page_ids, slice_ids = torch.arange(0, 20, 2), torch.arange(10) % 2
    outs = [torch.empty(10, 4096, dtype=torch.uint8) for _ in range(8)]
    tickets = [store.read_slices(i % 4, page_ids, slice_ids, out) for i, out in enumerate(outs)]
    for i in reversed(range(8)):
        tickets[i].wait()
        assert torch.equal(outs[i], pages_of(shape, 20, seed=i % 4)[page_ids, slice_ids])


def test_reads_stay_right_while_pages_are_appended(build: Build) -> None:
    shape = StoreShape(1, 2, 4096)
    store, pages = build(shape), pages_of(shape, 64)
    store.append(0, pages[:16])
    store.flush()
    out = torch.empty(16, 2, 4096, dtype=torch.uint8)
    ticket = store.read_pages(0, 0, out)
    store.append(0, pages[16:])
    ticket.wait()
    assert torch.equal(out, pages[:16])


@pytest.mark.parametrize("slice_bytes", SLICE_BYTES)
def test_one_slice_costs_at_least_itself_and_at_most_what_was_said(build: Build, slice_bytes: int) -> None:
    shape = StoreShape(1, 5, slice_bytes)
    store = build(shape)
    store.append(0, pages_of(shape, 3))
    store.flush()
    for slice_id in range(5):
        _, moved = read_slices(store, 0, ids(2), ids(slice_id))
        assert slice_bytes <= moved.cpu + moved.nvme <= store.slice_cost_bytes


def test_bytes_are_counted_in_the_tier_of_the_store(build: Build) -> None:
    shape = StoreShape(1, 2, 8192)
    store = build(shape)
    if isinstance(store, TieredStore):
        pytest.skip("counts where each slice was: test_tiered_store.py")
    written = store.append(0, pages_of(shape, 3))
    store.flush()
    _, moved = read_slices(store, 0, ids(0, 0, 2), ids(0, 1, 1))
    here = {"cpu": Moved(cpu=1), "nvme": Moved(nvme=1)}[store.tier]
    assert written == Moved(here.cpu * 3 * 16384, here.nvme * 3 * 16384)
    assert moved == Moved(here.cpu * 3 * 8192, here.nvme * 3 * 8192)


def test_mapped_memory_shows_the_pages_or_is_none(build: Build) -> None:
    shape = StoreShape(1, 2, 48)
    store, pages = build(shape), pages_of(shape, 3)
    store.append(0, pages)
    memory = store.mapped(0)
    assert (memory is None) == (store.tier == "nvme")
    if memory is not None:
        assert torch.equal(memory[:3], pages)


def test_closing_twice_does_nothing(build: Build) -> None:
    store = build(StoreShape(1, 2, 48))
    store.append(0, pages_of(store.shape, 3))
    store.close()
    store.close()


@pytest.mark.parametrize(("page_id", "slice_id"), [(2, 0), (-1, 0), (0, 3), (0, -1)])
def test_ids_outside_the_layer_are_refused(build: Build, page_id: int, slice_id: int) -> None:
    store = build(StoreShape(1, 3, 48))
    store.append(0, pages_of(store.shape, 2))
    with pytest.raises(IndexError, match="expected 0 to"):
        read_slices(store, 0, ids(page_id), ids(slice_id))
    with pytest.raises(IndexError, match="the layer has 2"):
        read_pages(store, 0, 1, 2)


def test_tensors_of_another_shape_or_type_are_refused(build: Build) -> None:
    store = build(StoreShape(1, 2, 48))
    store.append(0, pages_of(store.shape, 2))
    with pytest.raises(ValueError, match=r"expected torch.uint8 \[1, 2, 48\]"):
        store.append(0, torch.zeros(1, 2, 47, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected torch.uint8 \[1, 48\]"):
        store.read_slices(0, ids(0), ids(0), torch.zeros(1, 48))
    with pytest.raises(ValueError, match="contiguous"):
        store.read_slices(0, ids(0), ids(0), torch.zeros(48, 2, dtype=torch.uint8).t()[:1])
    with pytest.raises(ValueError, match=r"expected torch\.int64"):
        store.read_slices(0, ids(0).int(), ids(0), torch.zeros(1, 48, dtype=torch.uint8))
    with pytest.raises(ValueError, match="as many of each"):
        store.read_slices(0, ids(0), ids(0, 1), torch.zeros(1, 48, dtype=torch.uint8))
