"""Caps, floors, and what may be deleted to make room."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kvoffload_storage import (
    CapacityError,
    FileStore,
    StoreShape,
    UnavailableError,
    free_bytes,
    lock_bundle,
    open_bundle,
    read_manifest,
    save_bundle,
    space,
)
from kvoffload_storage.archive import export_bundle, import_bundle
from kvoffload_storage.rewrite import rewrite_bundle
from kvoffload_storage.space import Room

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
    store = FileStore(tmp_path, SHAPE, max_bytes=4 << 20)
    store.append(0, PAGES[:8])
    assert names(tmp_path) == ["a.kvo", "b.kvo", "c.kvo"]
    store.append(0, PAGES[:8])
    assert names(tmp_path) == ["a.kvo", "c.kvo"]
    assert "b.kvo" in store.note
    store.append(0, PAGES)
    assert names(tmp_path) == ["a.kvo"]
    with pytest.raises(CapacityError, match="bytes of pages and sessions, the cap is 4,194,304"):
        store.append(0, torch.cat([PAGES, PAGES]))
    assert names(tmp_path) == ["a.kvo"]
    assert store.n_pages(0) == 32
    store.close()


@pytest.mark.parametrize(("number", "kind"), [(errno.EMFILE, CapacityError), (errno.EACCES, UnavailableError)])
def test_a_folder_that_cannot_be_locked_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(kind, match=os.strerror(number)), Room(tmp_path, max_bytes=1).taking(1):
        pass


def test_a_session_in_use_is_not_deleted(tmp_path: Path) -> None:
    lock = lock_bundle(add(tmp_path, "a.kvo", pinned=False))
    assert Room(tmp_path).evict() is None
    lock.release()
    assert Room(tmp_path).evict() == "a.kvo"
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_session_is_not_deleted(tmp_path: Path) -> None:
    path = add(tmp_path, "a.kvo", pinned=False)
    (path / "manifest.json").write_bytes(b"x" * 100)
    assert Room(tmp_path).evict() is None


def test_files_that_are_shared_count_once(tmp_path: Path) -> None:
    store, room = FileStore(tmp_path, SHAPE), Room(tmp_path, max_bytes=1_200_000)
    store.append(0, PAGES)
    for name in ("a.kvo", "b.kvo"):
        save_bundle(tmp_path / name, [store.seal()], b"", {}, room=room)[1].release()
    store.close()
    assert room.fits(100_000)
    assert not room.fits(200_000)


def test_a_floor_keeps_bytes_free_on_the_disk(tmp_path: Path) -> None:
    add(tmp_path, "a.kvo", pinned=False)
    floor = free_bytes(tmp_path) + (1 << 40)
    with pytest.raises(CapacityError, match="the floor is"):
        FileStore(tmp_path, SHAPE, capacity_pages=4, floor_bytes=floor)
    assert names(tmp_path) == ["a.kvo"]
    store = FileStore(tmp_path, SHAPE)
    store._room = Room(tmp_path, floor_bytes=floor)
    with pytest.raises(CapacityError, match="bytes free on the disk, the floor is"):
        store.append(0, PAGES)
    assert names(tmp_path) == ["a.kvo"], "deleted in vain"
    assert store.n_pages(0) == 0
    store.close()


def test_pins_are_part_of_the_manifest(tmp_path: Path) -> None:
    assert read_manifest(add(tmp_path, "a.kvo", pinned=False)).pinned is False


def taken(folder: Path) -> int:
    """Bytes on the disk of all files below, each counted once."""
    files = {state.st_ino: state for path in folder.rglob("*") if path.is_file() for state in [path.lstat()]}
    return sum(state.st_blocks * 512 for state in files.values())


def test_the_cap_counts_the_pages_of_other_stores(tmp_path: Path) -> None:
    first, second = (FileStore(tmp_path, SHAPE, max_bytes=3 << 20) for _ in range(2))
    first.append(0, torch.cat([PAGES, PAGES]))
    with pytest.raises(CapacityError, match="the cap is 3,145,728"):
        second.append(0, PAGES)
    first.close()
    second.append(0, PAGES)
    second.close()


def test_no_growth_takes_what_other_layers_need(tmp_path: Path) -> None:
    shape = StoreShape(4, 1, 1 << 16)
    store = FileStore(tmp_path, shape, max_bytes=(6 << 20) + 4 * 4096)
    for layer in range(4):
        store.append(layer, PAGES)
    for layer in range(4):
        store.append(layer, PAGES[:8])
    assert taken(tmp_path) == (6 << 20) + 4 * 4096
    store.close()


def rewrite(path: Path, room: Room) -> None:
    rewrite_bundle(path, room=room)


def import_again(path: Path, room: Room) -> None:
    tar = path.parent.parent / "a.tar"
    if not tar.exists():
        export_bundle(path, tar)
    import_bundle(tar, path.with_name("b.kvo"), room=room)


def save_more(path: Path, room: Room) -> None:
    bundle = open_bundle(path)
    try:
        save_bundle(path, bundle.stores, bytes(1 << 20), {}, room=room)
    finally:
        bundle.close()


def save_elsewhere(path: Path, room: Room) -> None:
    store = FileStore(path.parent.parent, SHAPE)
    store.append(0, PAGES)
    try:
        save_bundle(path.with_name("b.kvo"), [store.seal()], b"", {}, room=room)
    finally:
        store.close()


@pytest.mark.parametrize("act", [rewrite, import_again, save_more, save_elsewhere])
def test_whatever_adds_bytes_is_admitted_before_it_writes(
    tmp_path: Path, act: Callable[[Path, Room], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, most = tmp_path / "nvme", [0]
    folder.mkdir()
    path = add(folder, "a.kvo", pinned=True)
    before = {p: p.lstat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    for name in ("posix_fallocate", "pwrite", "link"):
        watch(monkeypatch, name, lambda: most.append(taken(folder)))
    with pytest.raises(CapacityError, match="the cap is"):
        act(path, Room(folder, max_bytes=(3 << 20) // 2))
    assert max(most) <= (3 << 20) // 2
    with pytest.raises(CapacityError, match="the floor is"):
        act(path, Room(folder, floor_bytes=free_bytes(folder) + (1 << 40)))
    assert {p: p.lstat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before
    act(path, Room(folder, max_bytes=3 << 20))
    assert taken(folder) > 1 << 20


def test_an_export_keeps_the_floor_and_deletes_nothing_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = add(tmp_path, "a.kvo", pinned=False)
    monkeypatch.setattr(space, "free_bytes", lambda folder: 3 << 19)
    room = Room(tmp_path, floor_bytes=1 << 20, spares=True)
    with pytest.raises(CapacityError, match="the floor is"):
        export_bundle(path, tmp_path / "a.tar", room=room)
    assert [found.name for found in tmp_path.iterdir()] == ["a.kvo"]
    n_bytes = export_bundle(path, tmp_path / "a.tar", room=Room(tmp_path, floor_bytes=1, spares=True))
    assert (tmp_path / "a.tar").stat().st_size == n_bytes > 1 << 20


def watch(monkeypatch: pytest.MonkeyPatch, name: str, then: Callable[[], None]) -> None:
    real = getattr(os, name)

    def call(*arguments: Any, **options: Any) -> Any:
        done = real(*arguments, **options)
        then()
        return done

    monkeypatch.setattr(os, name, call)


def test_a_fork_adds_no_pages(tmp_path: Path) -> None:
    bundle = open_bundle(add(tmp_path, "a.kvo", pinned=True))
    room = Room(tmp_path, max_bytes=taken(tmp_path) + 3 * 4096)
    save_bundle(tmp_path / "b.kvo", bundle.stores, b"state", {}, room=room)[1].release()
    with pytest.raises(CapacityError, match="the cap is"):
        save_bundle(tmp_path / "c.kvo", bundle.stores, b"state", {}, room=room)
    assert names(tmp_path) == ["a.kvo", "b.kvo"]
    assert not list(tmp_path.glob("kvoffload-*"))
    bundle.close()
