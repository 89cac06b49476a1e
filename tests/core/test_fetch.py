"""Fetching: the bytes that arrive are those of the store, and what is counted is what moved."""

import pytest
import torch
from heads import CPU, geometry, random_pages
from kvoffload_storage import FileStore, LatencyStore, MemoryStore, StoreShape, TracingStore, WrapperStore
from torch.testing import assert_close

from kvoffload.cache.fetch import MappedFetch, SubmittedFetch
from kvoffload.cache.packed import pack_pages, unpack_slices
from kvoffload.cache.slots import PageCache, Staging
from kvoffload.values import Selection

SHAPE = geometry()  # two rows; a slice is four tokens of 8 + 16 numbers in fp32: 384 bytes
N_PAGES = 23
STORE = StoreShape(2, SHAPE.rows, SHAPE.slice_bytes)


class Hidden(WrapperStore):
    """Not addressable, whatever the store inside is."""

    def mapped(self, layer):
        return None


def open_store(tier):
    if tier == "nvme":
        return FileStore(None, STORE, n_threads=2, extent_bytes=1 << 12)
    return MemoryStore(STORE, tier=tier)


def mapped(tier):
    return lambda: (MappedFetch, open_store(tier))


def submitted(tier, *, seconds=None):
    def build():
        store = Hidden(open_store(tier))
        return SubmittedFetch, TracingStore(store if seconds is None else LatencyStore(store, seconds))

    return build


BUILDS = {
    "mapped-gpu": mapped("gpu"),
    "mapped-cpu": mapped("cpu"),
    "submitted-cpu": submitted("cpu"),
    "submitted-nvme": submitted("nvme"),
    "submitted-late": submitted("nvme", seconds=0.001),
}
SLOTS = {"staging": lambda: Staging(SHAPE.slice_bytes, CPU), "cache": lambda: PageCache(9, SHAPE.slice_bytes, CPU)}
PAGES = random_pages(SHAPE, N_PAGES)
BYTES = pack_pages(PAGES)  # [page, row, slice_bytes]


@pytest.mark.parametrize("tier", ["gpu", "cpu"])
def test_pages_that_attention_alone_reads_may_stay_where_they_are(tier):
    cls, store = BUILDS[f"mapped-{tier}"]()
    store.append(0, BYTES)
    slots, selection = Staging(SHAPE.slice_bytes, CPU), Selection(torch.tensor([0, 1, 1]), torch.tensor([22, 0, 7]))
    fetch = cls(store, 0, slots, SHAPE)
    [stay], [come] = (fetch.move(selection, in_place=in_place) for in_place in (True, False))
    assert stay().data.data_ptr() == store.mapped(0).data_ptr()
    assert torch.equal(stay().data[stay().places], BYTES[selection.page_ids, selection.row_ids])
    assert come().data.data_ptr() == slots.data.data_ptr()
    assert torch.equal(come().data, BYTES[selection.page_ids, selection.row_ids])


@pytest.fixture(params=BUILDS)
def built(request):
    """A fetch class and a store that holds the pages in its layer 1, and others in layer 0."""
    cls, store = BUILDS[request.param]()
    store.append(0, BYTES.flip(0))
    for first in range(0, N_PAGES, 5):
        store.append(1, BYTES[first : first + 5])
    store.flush()  # what is still in memory counts as read from there
    yield cls, store
    store.close()


def selection(*pairs):
    rows, pages = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    return Selection(rows, pages)


def random_selection(n, generator):
    picked = torch.randperm(SHAPE.rows * N_PAGES, generator=generator)[:n]
    return Selection(picked // N_PAGES, picked % N_PAGES)


def take(arrivals):
    """(row, page) -> bytes of everything that arrives."""
    found = {}
    for arrive in arrivals:
        arrived = arrive()
        part, data = arrived.selection, arrived.data
        if arrived.places is not None:
            data = data[arrived.places]
        assert len(data) == len(part)
        for i, pair in enumerate(zip(part.row_ids.tolist(), part.page_ids.tolist(), strict=True)):
            assert pair not in found
            found[pair] = data[i].clone()
    return found


def check(found, asked):
    assert set(found) == set(zip(asked.row_ids.tolist(), asked.page_ids.tolist(), strict=True))
    for (row, page), data in found.items():
        assert torch.equal(data, BYTES[page, row])


def moved(fetch):
    total = fetch.decode.total()
    return total.cpu + total.nvme


@pytest.mark.parametrize("slots", SLOTS)
def test_the_bytes_of_every_step_are_those_of_the_store(built, slots):
    cls, store = built
    fetch, generator = cls(store, 1, SLOTS[slots](), SHAPE), torch.Generator().manual_seed(0)
    for n in [5, 9, 0, 9, 3, 1, 9, 7, 8, 2] * 3:
        asked = random_selection(n, generator)
        check(take(fetch.start(asked)), asked)


def test_a_step_that_is_larger_than_the_cache_passes_it_by(built):
    cls, store = built
    fetch, generator = cls(store, 1, SLOTS["cache"](), SHAPE), torch.Generator().manual_seed(0)
    for n in (9, 30, 30, 46, 4):
        asked = random_selection(n, generator)
        check(take(fetch.start(asked)), asked)
    slots = fetch.slots
    assert slots.resident_bytes - slots.table_bytes == 9 * SHAPE.slice_bytes  # the size that was given is a bound
    assert slots.table_bytes >= 4 * SHAPE.rows * N_PAGES


def test_a_cache_keeps_what_it_has_while_its_keys_grow_in_number():
    cache, first = PageCache(9, SHAPE.slice_bytes, CPU), torch.tensor([0, 3, 2])
    with_room, _, _ = cache.admit(first, 4)
    table_bytes = cache.table_bytes
    places, hit, _ = cache.admit(torch.tensor([2, 700, 0]), 1000)
    assert hit.tolist() == [True, False, True]
    assert places[[2, 0]].tolist() == with_room[[0, 2]].tolist()
    assert cache.table_bytes > table_bytes
    assert cache.admit(torch.tensor([700]), 1000)[1].all()
    cache.forget()
    assert not cache.admit(torch.tensor([700, 3, 2]), 1000)[1].any()


def test_what_is_resident_does_not_move_again(built):
    cls, store = built
    fetch = cls(store, 1, SLOTS["cache"](), SHAPE)
    first, second = selection((0, 3), (1, 3), (1, 20)), selection((1, 20), (0, 4), (0, 3))
    take(fetch.start(first))
    before = moved(fetch)
    check(take(fetch.start(first)), first)
    assert moved(fetch) == before
    check(take(fetch.start(second)), second)
    if store.tier != "gpu":
        assert SHAPE.slice_bytes <= moved(fetch) - before <= store.slice_cost_bytes
    assert (fetch.n_asked, int(fetch.n_hits)) == (9, 5)


def test_without_a_cache_every_slice_moves_in_every_step(built):
    cls, store = built
    fetch, asked = cls(store, 1, SLOTS["staging"](), SHAPE), selection((0, 0), (1, 22))
    for n_steps in range(1, 4):
        take(fetch.start(asked))
        if store.tier == "gpu":
            assert moved(fetch) == 0
        else:
            assert 2 * n_steps * SHAPE.slice_bytes <= moved(fetch) <= 2 * n_steps * store.slice_cost_bytes
    assert (fetch.n_asked, int(fetch.n_hits)) == (6, 0)


def test_bytes_count_in_the_tier_they_came_from(built):
    cls, store = built
    fetch = cls(store, 1, SLOTS["staging"](), SHAPE)
    take(fetch.start(selection((0, 0))))
    total = fetch.decode.total()
    assert (total.cpu > 0, total.nvme > 0) == (store.tier == "cpu", store.tier == "nvme")


@pytest.mark.parametrize("block", [1, 4, 23, 100])
def test_a_stream_gives_every_page_once_and_in_order(built, block):
    cls, store = built
    fetch, seen = cls(store, 1, SLOTS["staging"](), SHAPE), 0
    for pages in fetch.stream(block):
        assert pages.n_pages == min(block, N_PAGES - seen)
        assert_close(pages.keys, PAGES.keys[:, seen : seen + pages.n_pages])
        assert_close(pages.values, PAGES.values[:, seen : seen + pages.n_pages])
        seen += pages.n_pages
    assert seen == N_PAGES
    assert moved(fetch) == 0
    total = fetch.prefill.total()
    expected = 0 if store.tier == "gpu" else N_PAGES * STORE.page_bytes
    assert total.cpu + total.nvme >= expected
    assert total.cpu in (0, expected)


def test_a_stream_of_no_pages_is_empty():
    for cls, store in (BUILDS["mapped-cpu"](), BUILDS["submitted-cpu"]()):
        assert list(cls(store, 1, SLOTS["staging"](), SHAPE).stream(4)) == []


def test_requests_can_be_counted_as_prefill(built):
    cls, store = built
    fetch = cls(store, 1, SLOTS["cache"](), SHAPE)
    take(fetch.start(selection((0, 1))))
    before = moved(fetch), fetch.n_asked, int(fetch.n_hits)
    with fetch.counted_as_prefill():
        take(fetch.start(selection((0, 1), (1, 2), (0, 9))))
    assert (moved(fetch), fetch.n_asked, int(fetch.n_hits)) == before
    total = fetch.prefill.total()
    assert (total.cpu + total.nvme > 0) == (store.tier != "gpu")
    take(fetch.start(selection((0, 1))))
    assert (fetch.n_asked, int(fetch.n_hits)) == (2, 1)


def test_pages_that_are_not_on_disk_yet_arrive_too():
    cls, store = BUILDS["submitted-nvme"]()
    fetch, asked = cls(store, 1, SLOTS["staging"](), SHAPE), selection((0, 2), (1, 0))
    for first in range(3):
        store.append(1, BYTES[first : first + 1])
    check(take(fetch.start(asked)), asked)
    store.close()


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("name", ["submitted-cpu", "submitted-nvme"])
def test_the_counts_together_are_what_the_store_moved(name, slots):
    cls, store = BUILDS[name]()
    store.append(1, BYTES)
    fetch, generator = cls(store, 1, SLOTS[slots](), SHAPE), torch.Generator().manual_seed(0)
    for _ in range(6):
        take(fetch.start(random_selection(7, generator)))
    list(fetch.stream(5))
    assert fetch.decode.total() + fetch.prefill.total() == store.read
    assert store.slices_asked == fetch.n_asked - int(fetch.n_hits)
    store.close()


def test_pages_are_packed_as_told():
    """[page][row][K|V][S][D]: the numbers of one slice are its keys token by token, then its values."""
    numbers = BYTES.view(torch.float32)
    assert torch.equal(numbers[5, 1, : 4 * 8], PAGES.keys[1, 5].flatten())
    assert torch.equal(numbers[5, 1, 4 * 8 :], PAGES.values[1, 5].flatten())


def test_unpacking_gives_back_what_was_packed():
    keys, values = unpack_slices(BYTES, SHAPE)
    assert torch.equal(keys.transpose(0, 1), PAGES.keys)
    assert torch.equal(values.transpose(0, 1), PAGES.values)
