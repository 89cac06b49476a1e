"""Caps, floors, and what may be deleted to make room."""

from pathlib import Path

import pytest
import torch
from kvoffload_storage import (
    CapacityError,
    FileStore,
    StoreShape,
    free_bytes,
    lock_bundle,
    read_manifest,
    save_bundle,
)
from kvoffload_storage.space import SessionSpace

SHAPE = StoreShape(1, 1, 1 << 16)
PAGES = torch.zeros(16, 1, 1 << 16, dtype=torch.uint8)  # 1 MiB


def add(folder: Path, name: str, *, pinned: bool) -> Path:
    store = FileStore(folder, SHAPE)
    store.append(0, PAGES)
    save_bundle(folder / name, [store.seal()], b"", {}, pinned=pinned)[1].release()
    store.close()
    return folder / name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.kvo"))


def test_a_cap_counts_sessions_and_deletes_the_oldest_that_may_go(tmp_path: Path) -> None:
    for name, pinned in (("a.kvo", True), ("b.kvo", False), ("c.kvo", False)):
        add(tmp_path, name, pinned=pinned)
    store = FileStore(tmp_path, SHAPE, max_bytes=4 << 20, space=SessionSpace(tmp_path))
    store.append(0, PAGES[:8])
    assert names(tmp_path) == ["a.kvo", "b.kvo", "c.kvo"]
    store.append(0, PAGES[:8])
    assert names(tmp_path) == ["a.kvo", "c.kvo"]
    assert "b.kvo" in store.note
    store.append(0, PAGES)
    assert names(tmp_path) == ["a.kvo"]
    with pytest.raises(CapacityError, match="the store and the sessions beside it would take"):
        store.append(0, torch.cat([PAGES, PAGES]))
    assert names(tmp_path) == ["a.kvo"]
    assert store.n_pages(0) == 32
    store.close()


def test_a_session_in_use_is_not_deleted(tmp_path: Path) -> None:
    lock = lock_bundle(add(tmp_path, "a.kvo", pinned=False))
    assert SessionSpace(tmp_path).evict() is None
    lock.release()
    assert SessionSpace(tmp_path).evict() == "a.kvo"
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_session_is_not_deleted(tmp_path: Path) -> None:
    path = add(tmp_path, "a.kvo", pinned=False)
    (path / "manifest.json").write_bytes(b"x" * 100)
    assert SessionSpace(tmp_path).evict() is None


def test_shared_files_count_once_and_own_ones_not_at_all(tmp_path: Path) -> None:
    store = FileStore(tmp_path, SHAPE)
    store.append(0, PAGES)
    for name in ("a.kvo", "b.kvo"):
        save_bundle(tmp_path / name, [store.seal()], b"", {})[1].release()
    own = {path.stat().st_ino for path in store.directory.iterdir()}
    space = SessionSpace(tmp_path)
    assert space.used_bytes(own) < 1 << 17
    assert 1 << 20 <= space.used_bytes(set()) < 1.2 * (1 << 20)
    store.close()


def test_a_floor_keeps_bytes_free_on_the_disk(tmp_path: Path) -> None:
    add(tmp_path, "a.kvo", pinned=False)
    floor = free_bytes(tmp_path) + (1 << 40)
    with pytest.raises(CapacityError, match="the floor is"):
        FileStore(tmp_path, SHAPE, capacity_pages=4, floor_bytes=floor)
    assert names(tmp_path) == ["a.kvo"]
    store = FileStore(tmp_path, SHAPE, floor_bytes=floor, space=SessionSpace(tmp_path))
    with pytest.raises(CapacityError, match="bytes free on the disk, the floor is"):
        store.append(0, PAGES)
    assert names(tmp_path) == []
    assert store.n_pages(0) == 0
    store.close()


def test_pins_are_part_of_the_manifest(tmp_path: Path) -> None:
    assert read_manifest(add(tmp_path, "a.kvo", pinned=False)).pinned is False
