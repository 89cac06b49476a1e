"""What only memory does: tiers, growth under a cap, pinning."""

import pytest
import torch
from kvoffload_storage import CapacityError, MemoryStore, Moved, StoreShape, aligned_empty

SHAPE = StoreShape(1, 2, 48)


def test_the_gpu_tier_moves_nothing() -> None:
    store = MemoryStore(SHAPE, tier="gpu")
    assert store.tier == "gpu"
    assert store.append(0, torch.ones(2, 2, 48, dtype=torch.uint8)) == Moved()
    out = torch.empty(1, 48, dtype=torch.uint8)
    assert store.read_slices(0, torch.tensor([1]), torch.tensor([0]), out).wait() == Moved()
    assert out.eq(1).all()


def test_another_device_is_the_gpu_tier() -> None:
    store = MemoryStore(SHAPE, device="meta", capacity_pages=4)
    mapped = store.mapped(0)
    assert store.tier == "gpu"
    assert mapped is not None
    assert (mapped.device.type, mapped.shape) == ("meta", (4, 2, 48))


def test_growth_is_amortised_and_stops_at_the_cap() -> None:
    store = MemoryStore(SHAPE, capacity_pages=4, max_bytes=7 * 96)
    store.append(0, torch.zeros(5, 2, 48, dtype=torch.uint8))
    assert store.allocated_bytes == 7 * 96
    free = MemoryStore(SHAPE, capacity_pages=4)
    free.append(0, torch.zeros(5, 2, 48, dtype=torch.uint8))
    assert free.allocated_bytes == 8 * 96


def test_closing_gives_the_memory_back() -> None:
    store = MemoryStore(SHAPE, capacity_pages=4)
    store.close()
    assert store.allocated_bytes == 0


def test_a_capacity_that_no_machine_has_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match=r"no host memory for [0-9,]+ bytes"):
        MemoryStore(SHAPE, capacity_pages=1 << 50)


def test_memory_is_pinned_only_when_asked_and_a_refusal_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def refuse(*args: object, pin_memory: bool = False, **options: object) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return real(*args, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    MemoryStore(SHAPE, capacity_pages=4)
    with pytest.raises(CapacityError, match=r"cannot pin 384 bytes .*RLIMIT_MEMLOCK, .*CUDA error"):
        MemoryStore(SHAPE, pinned=True, capacity_pages=4)


@pytest.mark.parametrize("pad", [0, 64])
def test_pinned_memory_that_comes_aligned_is_not_padded(pad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pageable = aligned_empty(3 * 8192)[pad:]
    asked: list[int] = []

    def pinned_empty(n_bytes: int, **_: object) -> torch.Tensor:
        asked.append(n_bytes)
        return pageable[:n_bytes]

    monkeypatch.setattr(torch, "empty", pinned_empty)
    assert aligned_empty(8192, pinned=True).data_ptr() % 4096 == 0
    assert asked == ([8192] if pad == 0 else [8192, 12288])


def test_a_full_device_is_a_capacity_error(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore(SHAPE, device="meta")

    def refuse(*args: object, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(CapacityError, match="meta: no memory for 3 pages: no more"):
        store.append(0, torch.zeros(3, 2, 48, dtype=torch.uint8))


def test_reserved_memory_stays_where_it_is_while_pages_come() -> None:
    store = MemoryStore(SHAPE)
    store.append(0, torch.full((3, 2, 48), 7, dtype=torch.uint8))
    assert store.reserve(40)
    mapped = store.mapped(0)
    assert mapped is not None
    for n in range(3, 40):
        store.append(0, torch.full((1, 2, 48), n, dtype=torch.uint8))
    after = store.mapped(0)
    assert after is not None
    assert after.data_ptr() == mapped.data_ptr()
    assert mapped[:3].eq(7).all()
    assert mapped[39].eq(39).all()


def test_a_reserve_beyond_the_cap_is_refused_and_changes_nothing() -> None:
    store = MemoryStore(SHAPE, capacity_pages=4, max_bytes=7 * 96)
    assert not store.reserve(8)
    assert store.allocated_bytes == 4 * 96
    assert store.reserve(7)
