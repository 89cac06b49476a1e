"""What only files do: folders, direct I/O, write-behind, checksums, failures of the disk, kept stores."""

import contextlib
import errno
import gc
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from kvoffload_storage import (
    CapacityError,
    FileStore,
    IntegrityError,
    Moved,
    StorageError,
    StoreShape,
    UnavailableError,
    available_engines,
)
from kvoffload_storage import file as file_module
from kvoffload_storage import write_behind as write_behind_module
from kvoffload_storage.format import HEADER_BYTES
from torch import Tensor

SHAPE = StoreShape(2, 2, 4096)
STRIDE = 8192
EXTENT_BYTES = 4 * STRIDE


def pages_of(n: int, shape: StoreShape = SHAPE, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, shape.n_slices, shape.slice_bytes), dtype=torch.uint8, generator=random)


def read_all(store: FileStore, layer: int) -> Tensor:
    out = torch.zeros(store.n_pages(layer), store.shape.n_slices, store.shape.slice_bytes, dtype=torch.uint8)
    store.read_pages(layer, 0, out).wait()
    return out


def refuse_writes(monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> None:
    def pwrite(fd: int, data: object, offset: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", pwrite)


def flip_byte(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
        file.flush()
        os.fsync(file.fileno())


def test_the_folder_is_private_and_goes_with_the_store(tmp_path: Path) -> None:
    store = FileStore(tmp_path, SHAPE)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in store.directory.iterdir()] == [0o600, 0o600]
    assert sorted(path.name for path in store.directory.iterdir()) == ["layer-0000.kv", "layer-0001.kv"]
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_stores_in_one_directory_do_not_meet(tmp_path: Path) -> None:
    stores = [FileStore(tmp_path / "new", SHAPE) for _ in range(2)]
    for seed, store in enumerate(stores):
        store.append(0, pages_of(9, seed=seed))
        store.flush()
    assert [torch.equal(read_all(store, 0), pages_of(9, seed=seed)) for seed, store in enumerate(stores)] == [True] * 2
    stores[0].close()
    assert stores[1].verify() == 9
    stores[1].close()


def test_a_dropped_store_takes_its_folder_along(tmp_path: Path) -> None:
    store = FileStore(tmp_path, SHAPE)
    store.append(0, pages_of(9))
    del store
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_forgets_to_close_leaves_no_folder(tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom kvoffload_storage import FileStore, StoreShape\n"
        f"store = FileStore(Path({str(tmp_path)!r}), StoreShape(1, 1, 4096), engine='aiofiles', extent_bytes=4096)\n"
        "store.append(0, torch.zeros(9, 1, 4096, dtype=torch.uint8)); store.flush()\n"
        "store.read_pages(0, 0, torch.zeros(9, 1, 4096, dtype=torch.uint8)).wait()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_importing_starts_no_thread_and_makes_no_file() -> None:
    code = "import threading, kvoffload_storage, sys; sys.exit(threading.active_count() - 1)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="file"):
        FileStore(tmp_path / "file", SHAPE)


def test_an_unknown_engine_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="'tape', expected one of threads, aio, aiofiles, uring, gds"):
        FileStore(tmp_path, SHAPE, engine="tape")


def test_an_engine_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    reasons = {name: reason for name, reason in available_engines().items() if reason}
    for name, reason in reasons.items():
        with pytest.raises(UnavailableError, match=name) as caught:
            FileStore(tmp_path, SHAPE, engine=name)
        assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_direct_io_off_is_said_aloud() -> None:
    store = FileStore(None, SHAPE, direct="off")
    assert (store.direct, store.direct_note) == (False, "direct I/O was turned off")
    store.close()


def test_a_disk_without_direct_io_is_used_buffered_unless_direct_is_demanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "probe_direct", lambda directory: (False, "no such thing here"))
    store = FileStore(tmp_path, SHAPE)
    assert (store.direct, store.direct_note) == (False, "no such thing here")
    store.append(0, pages_of(5))
    assert torch.equal(read_all(store, 0), pages_of(5))
    store.close()
    with pytest.raises(UnavailableError, match="no such thing here"):
        FileStore(tmp_path, SHAPE, direct="on")
    assert list(tmp_path.iterdir()) == []


def test_pages_in_an_open_extent_count_as_memory() -> None:
    store = FileStore(None, SHAPE, extent_bytes=EXTENT_BYTES)
    store.append(0, pages_of(4))
    store.flush()
    store.append(0, pages_of(3))
    out = torch.empty(7, 2, 4096, dtype=torch.uint8)
    assert store.read_pages(0, 0, out).wait() == Moved(cpu=3 * STRIDE, nvme=4 * STRIDE)
    store.close()


def test_surplus_bytes_of_alignment_count_as_read() -> None:
    store = FileStore(None, StoreShape(1, 3, 48))
    store.append(0, pages_of(4, StoreShape(1, 3, 48)))
    store.flush()
    out = torch.empty(2, 48, dtype=torch.uint8)
    ticket = store.read_slices(0, torch.tensor([0, 2]), torch.tensor([1, 1]), out)
    assert ticket.wait() == Moved(nvme=2 * 4096)
    store.close()


def test_in_flight_memory_is_bounded_while_the_disk_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), os.pwrite
    in_flight: list[int] = []

    def slow_pwrite(fd: int, data: bytes, offset: int) -> int:
        gate.wait(10)
        return real(fd, data, offset)

    monkeypatch.setattr(file_module, "IN_FLIGHT_BYTES", 3 * EXTENT_BYTES)
    store = FileStore(None, SHAPE, extent_bytes=EXTENT_BYTES)
    monkeypatch.setattr(os, "pwrite", slow_pwrite)
    start = write_behind_module.WriteBehind._start

    def watch(self: write_behind_module.WriteBehind, layer: int, extent: write_behind_module.Extent) -> None:
        if len(self._in_flight) == 3:
            gate.set()
        start(self, layer, extent)
        in_flight.append(len(self._in_flight))

    monkeypatch.setattr(write_behind_module.WriteBehind, "_start", watch)
    store.append(0, pages_of(40))
    assert max(in_flight) == 3
    assert torch.equal(read_all(store, 0), pages_of(40))
    store.flush()
    assert store.verify() == 40
    store.close()


def test_a_flipped_byte_is_found_and_named() -> None:
    store = FileStore(None, SHAPE)
    store.append(1, pages_of(6))
    store.flush()
    assert store.verify() == 6
    flip_byte(store.directory / "layer-0001.kv", 4096 + 4 * STRIDE + 17)
    with pytest.raises(IntegrityError, match=r"layer 1, page 4, slice 0 has checksum"):
        store.verify()
    assert store.read_pages(1, 0, torch.empty(4, 2, 4096, dtype=torch.uint8)).wait() == Moved(nvme=4 * STRIDE)
    store.close()


@pytest.mark.parametrize("engine", [name for name, why_not in available_engines().items() if not why_not])
@pytest.mark.parametrize("direct", ["auto", "off"])
def test_a_file_cut_short_is_found(engine: str, direct: file_module.Direct) -> None:
    store = FileStore(None, SHAPE, engine=engine, direct=direct)
    store.append(0, pages_of(6))
    store.flush()
    os.truncate(store.directory / "layer-0000.kv", 4096 + 5 * STRIDE)
    with pytest.raises(IntegrityError, match=r"layer-0000\.kv: 0 bytes at 45056, expected 4096") as caught:
        store.read_slices(0, torch.tensor([5]), torch.tensor([0]), torch.empty(1, 4096, dtype=torch.uint8)).wait()
    assert (caught.value.layer, caught.value.page) == (0, 5)
    store.close()


def test_a_failed_read_names_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(None, SHAPE, direct="off")
    store.append(0, pages_of(6))
    store.flush()

    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(StorageError, match=r"layer-0000\.kv: Input/output error"):
        read_all(store, 0)
    store.close()


def test_a_failed_write_surfaces_and_loses_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(None, SHAPE, extent_bytes=EXTENT_BYTES)
    with monkeypatch.context() as broken:
        refuse_writes(broken)
        store.append(0, pages_of(4))
        with pytest.raises(CapacityError, match=r"layer-0000\.kv: no room for 32,768 bytes, [0-9,]+ bytes free"):
            store.flush()
        assert torch.equal(read_all(store, 0), pages_of(4))
        with pytest.raises(CapacityError, match="no room"):
            store.append(0, pages_of(1))
        with pytest.raises(CapacityError, match="no room"):
            store.flush()
    store.flush()
    assert store.verify() == 4
    assert torch.equal(read_all(store, 0), pages_of(4))
    store.append(0, pages_of(2))
    assert store.n_pages(0) == 6
    store.close()


def test_a_disk_that_fails_under_a_long_append_stops_it_and_keeps_what_was_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(file_module, "IN_FLIGHT_BYTES", 2 * EXTENT_BYTES)
    store = FileStore(None, SHAPE, extent_bytes=EXTENT_BYTES)
    refuse_writes(monkeypatch)
    with pytest.raises(CapacityError, match="no room"):
        store.append(0, pages_of(400))
    kept = store.n_pages(0)
    assert 0 < kept <= 5 * 4
    with contextlib.suppress(CapacityError):
        store._writes._drain(0)
        store._writes.raise_failure()
    assert torch.equal(read_all(store, 0), pages_of(400)[:kept])
    store.close()


def test_a_failed_write_surfaces_at_the_next_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(None, SHAPE, extent_bytes=EXTENT_BYTES)
    refuse_writes(monkeypatch, errno.EIO)
    store.append(0, pages_of(4))
    store._writes._drain(0)
    with pytest.raises(StorageError, match="Input/output error"):
        read_all(store, 0)
    assert torch.equal(read_all(store, 0), pages_of(4))
    store.close()


def test_a_disk_that_is_full_at_the_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(CapacityError, match=r"layer-0000\.kv: no room for 86,016 bytes, [0-9,]+ bytes free"):
        FileStore(tmp_path, SHAPE, capacity_pages=10)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_pages_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(None, SHAPE, capacity_pages=4)
    store.append(0, pages_of(4))
    real = os.posix_fallocate

    def half_then_refuse(fd: int, offset: int, size: int) -> None:
        real(fd, offset, size - 4096)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", half_then_refuse)
    with pytest.raises(CapacityError, match="no room"):
        store.append(0, pages_of(1))
    assert (store.directory / "layer-0000.kv").stat().st_size == 4096 + 4 * STRIDE
    assert store.n_pages(0) == 4
    store.flush()
    assert store.verify() == 4
    store.close()


def test_where_doubling_does_not_fit_the_need_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(None, SHAPE, capacity_pages=4)
    real = os.posix_fallocate

    def refuse_large(fd: int, offset: int, size: int) -> None:
        if size > 4096 + 6 * STRIDE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", refuse_large)
    store.append(0, pages_of(5))
    assert store.allocated_bytes == (5 + 4) * STRIDE
    store.close()


def test_growth_stops_at_the_cap() -> None:
    headers = SHAPE.n_layers * HEADER_BYTES
    store = FileStore(None, SHAPE, capacity_pages=4, max_bytes=10 * STRIDE + headers)
    store.append(0, pages_of(5))
    assert store.allocated_bytes == 9 * STRIDE
    with pytest.raises(CapacityError, match=f"cap is {81_920 + headers:,}"):
        store.append(0, pages_of(2))
    store.close()
