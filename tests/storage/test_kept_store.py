"""Stores that are kept: what is written, what comes back, what is refused."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from kvoffload_storage import CapacityError, FileStore, IntegrityError, StorageError, StoreShape
from torch import Tensor

SHAPE = StoreShape(2, 2, 4096)
STRIDE = 8192


def pages_of(n: int, shape: StoreShape = SHAPE, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, shape.n_slices, shape.slice_bytes), dtype=torch.uint8, generator=random)


def read_all(store: FileStore, layer: int) -> Tensor:
    out = torch.zeros(store.n_pages(layer), store.shape.n_slices, store.shape.slice_bytes, dtype=torch.uint8)
    store.read_pages(layer, 0, out).wait()
    return out


def test_a_kept_store_comes_back_and_grows(tmp_path: Path) -> None:
    store = FileStore(tmp_path, SHAPE)
    store.append(0, pages_of(7))
    store.append(1, pages_of(3, seed=1))
    directory = store.keep()
    store.close()
    assert sorted(path.name for path in directory.iterdir()) == [
        "checksums.xxh3",
        "layer-0000.kv",
        "layer-0001.kv",
        "manifest.json",
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    again = FileStore.reopen(directory)
    assert again.shape == SHAPE
    assert again.verify() == 10
    again.append(1, pages_of(9, seed=2))
    assert torch.equal(read_all(again, 1), torch.cat([pages_of(3, seed=1), pages_of(9, seed=2)]))
    assert again.keep() == directory
    again.close()
    third = FileStore.reopen(directory, direct="off")
    assert third.verify() == 19
    third.close()


def kept_store(parent: Path) -> Path:
    store = FileStore(parent, SHAPE)
    store.append(0, pages_of(7))
    directory = store.keep()
    store.close()
    return directory


def test_a_store_that_was_not_kept_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"manifest\.json: No such file"):
        FileStore.reopen(tmp_path)


def test_a_kept_store_with_a_layer_missing_or_swapped_or_short_is_refused(tmp_path: Path) -> None:
    directory = kept_store(tmp_path)
    first, second = directory / "layer-0000.kv", directory / "layer-0001.kv"
    second.rename(directory / "aside")
    with pytest.raises(IntegrityError, match=r"layer-0001\.kv: No such file"):
        FileStore.reopen(directory)
    shutil.copy(first, second)
    with pytest.raises(IntegrityError, match=r"layer-0001\.kv: header says .*layer=0"):
        FileStore.reopen(directory)
    os.truncate(first, 4096 + 6 * STRIDE)
    with pytest.raises(IntegrityError, match=r"layer-0000\.kv: room for 6 pages, the manifest says 7"):
        FileStore.reopen(directory)
    os.truncate(first, 100)
    with pytest.raises(IntegrityError, match=r"layer-0000\.kv: header has 100 bytes"):
        FileStore.reopen(directory)


def test_links_inside_a_kept_store_are_not_followed(tmp_path: Path) -> None:
    directory = kept_store(tmp_path)
    (directory / "layer-0000.kv").rename(tmp_path / "elsewhere")
    (directory / "layer-0000.kv").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match=r"layer-0000\.kv: Too many levels"):
        FileStore.reopen(directory)


def test_a_table_longer_than_its_manifest_is_not_read(tmp_path: Path) -> None:
    directory = kept_store(tmp_path)
    os.truncate(directory / "checksums.xxh3", 1 << 40)
    with pytest.raises(IntegrityError, match=r"checksums\.xxh3: 1,099,511,627,776 bytes, expected at most 56"):
        FileStore.reopen(directory)


def test_a_disk_full_while_keeping_leaves_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path, SHAPE)
    store.append(0, pages_of(2))

    def refuse(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CapacityError, match=r"checksums\.xxh3\.tmp: no room"):
        store.keep()
    assert sorted(path.name for path in store.directory.iterdir()) == ["layer-0000.kv", "layer-0001.kv"]
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_sync_surfaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path, SHAPE)

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(StorageError, match="Input/output error"):
        store.keep()
    store.close()
