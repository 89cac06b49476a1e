"""aio on a stand-in kernel, and gds on a stand-in for torch's GdsFile."""

import ctypes
import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from blocks import BLOCK, batch
from kvoffload_storage import FileStore, IntegrityError, StorageError, StoreShape
from kvoffload_storage.engines import aio, build_engine, choice, gds
from kvoffload_storage.page_file import PageFile


class StandInKernel:
    """Reads at the submit; completions come last first. ``refuse`` submits fail first, ``most_read`` makes reads
    short."""

    def __init__(self) -> None:
        self.done: list[tuple[int, int, int, int]] = []
        self.most_in_flight, self.most_read, self.refuse, self.closed = 0, 1 << 30, [], 0

    def submit(self, pointers: int, n: int) -> int:
        if self.refuse:
            raise self.refuse.pop()
        n = min(n, 5)  # the kernel may take fewer
        for pointer in (ctypes.c_uint64 * n).from_address(pointers):
            request = np.frombuffer((ctypes.c_char * 64).from_address(pointer), aio._REQUEST)[0]
            vectors = (ctypes.c_uint64 * (2 * int(request["n_buffers"]))).from_address(int(request["buffers"]))
            buffers = [(ctypes.c_char * size).from_address(at) for at, size in zip(vectors[::2], vectors[1::2])]  # noqa: B905
            try:
                n_read = min(os.preadv(int(request["fd"]), buffers, int(request["offset"])), self.most_read)
            except OSError as error:
                n_read = -(error.errno or 0)
            self.done.append((int(request["number"]), pointer, n_read, 0))
        self.most_in_flight = max(self.most_in_flight, len(self.done))
        return n

    def wait(self, least: int, events: np.ndarray) -> int:
        assert 0 < least <= len(self.done)
        taken = [self.done.pop() for _ in range(least)]
        events[:least] = taken
        return least

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> StandInKernel:
    stand_in = StandInKernel()
    monkeypatch.setattr(choice, "why_no_aio", lambda: "")
    monkeypatch.setattr(aio, "_Kernel", lambda depth: stand_in)
    return stand_in


@pytest.mark.parametrize("in_place", [True, False])
def test_aio_keeps_its_queue_full_over_batches(kernel: StandInKernel, file: PageFile, in_place: bool) -> None:
    engine = build_engine("aio", n_threads=1)
    outs = [np.zeros((100, BLOCK), np.uint8) for _ in range(3)]
    blocks = list(range(99, -1, -1))
    pending = [engine.read(file, batch(out, blocks, in_place=in_place)) for out in outs]
    engine.read(file, batch(outs[0], [], in_place=in_place)).result()
    for read, out in zip(pending, outs, strict=True):
        read.result()
        assert out[:, 0].tolist() == out[:, -1].tolist() == blocks
    engine.close()
    engine.close()
    assert (kernel.most_in_flight, kernel.done, kernel.closed) == (aio.DEPTH, [], 1)


@pytest.mark.parametrize("in_place", [True, False])
def test_aio_reads_again_what_came_short(kernel: StandInKernel, file: PageFile, in_place: bool) -> None:
    engine = build_engine("aio", n_threads=1)
    out = np.zeros((100, BLOCK), np.uint8)
    kernel.most_read = 512
    engine.read(file, batch(out, list(range(100)), in_place=in_place)).result()
    assert out[:, -1].tolist() == list(range(100))
    engine.close()


def test_aio_that_fails_ends_its_batch_and_reads_the_next(kernel: StandInKernel, file: PageFile) -> None:
    engine = build_engine("aio", n_threads=1)
    out = np.zeros((100, BLOCK), np.uint8)
    with pytest.raises(IntegrityError, match="0 bytes at 4096000, expected 4096"):
        engine.read(file, batch(out, [*range(99), 1000], in_place=True)).result()
    with pytest.raises(StorageError, match="blocks: Invalid argument"):
        engine.read(file, batch(out, [*range(99), -1], in_place=True)).result()
    kernel.refuse = [BlockingIOError(errno.EAGAIN, "Try again")]
    with pytest.raises(StorageError, match="blocks: Try again"):
        engine.read(file, batch(out, list(range(100)), in_place=True)).result()
    kernel.refuse = [OSError(errno.EINVAL, "Invalid argument")]
    with pytest.raises(StorageError, match="blocks: Invalid argument"):
        engine.read(file, batch(out, list(range(100)), in_place=True)).result()
    engine.read(file, batch(out, list(range(100)), in_place=True)).result()
    assert out[:, 7].tolist() == list(range(100))
    engine.close()
    assert kernel.done == []


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ("pass", ""),
        ("import sys; sys.exit('Function not implemented')", "Function not implemented"),
        ("import os; os.kill(os.getpid(), 31)", "the system killed the probe (SIGSYS)"),
    ],
)
def test_a_probe_says_why_aio_cannot_be_used(probe: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "_PROBE", probe)
    assert aio.why_no_aio.__wrapped__() == reason


def test_aio_is_for_machines_whose_calls_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio.platform, "machine", lambda: "pdp11")
    assert aio.why_no_aio.__wrapped__() == "no system call numbers for linux on pdp11"


class StandInGdsFile:
    """Loads into storages of host memory, as torch's does into a device's; ``fails`` makes it refuse as cuFile does."""

    opened = 0
    fails = ""

    def __init__(self, path: str, flags: int) -> None:
        self.fd = os.open(path, flags)
        StandInGdsFile.opened += 1

    def __del__(self) -> None:
        os.close(self.fd)

    def load_storage(self, storage: torch.UntypedStorage, offset: int = 0) -> None:
        if StandInGdsFile.fails:
            raise RuntimeError(StandInGdsFile.fails)
        target = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        os.preadv(self.fd, [target], offset)


@pytest.fixture
def gds_here(monkeypatch: pytest.MonkeyPatch) -> type[StandInGdsFile]:
    monkeypatch.setattr(choice, "why_no_gds", lambda directory: "")
    monkeypatch.setattr(gds, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda.gds, "GdsFile", StandInGdsFile)
    monkeypatch.setattr(StandInGdsFile, "opened", 0)
    monkeypatch.setattr(StandInGdsFile, "fails", "")
    return StandInGdsFile


@pytest.mark.parametrize("slice_bytes", [4096, 48])
def test_gds_fills_memory_slice_by_slice(gds_here: type[StandInGdsFile], tmp_path: Path, slice_bytes: int) -> None:
    pages = torch.randint(0, 256, (9, 3, slice_bytes), dtype=torch.uint8)
    store = FileStore(tmp_path, StoreShape(1, 3, slice_bytes), engine="gds", extent_bytes=1)
    store.append(0, pages)
    store.flush()
    assert (store.engine, store.reads_to_device) == ("gds", True)
    page_ids, slice_ids = torch.tensor([8, 0, 8, 3, 3]), torch.tensor([2, 0, 2, 1, 2])
    whole = torch.zeros(7, slice_bytes, dtype=torch.uint8)
    for _ in range(2):
        store.read_slices(0, page_ids, slice_ids, whole[1:6]).wait()
        assert torch.equal(whole[1:6], pages[page_ids, slice_ids])
    assert not whole[[0, 6]].any()
    assert gds_here.opened == 1
    store.close()


def test_gds_tells_what_cufile_refuses_and_what_is_missing(gds_here: type[StandInGdsFile], file: PageFile) -> None:
    engine = build_engine("gds", n_threads=2)
    out = np.zeros((100, BLOCK), np.uint8)
    with pytest.raises(IntegrityError, match="0 bytes at 409600, expected 4096"):
        engine.read(file, batch(out, [*range(99), 100], in_place=True)).result()
    gds_here.fails = "cuFileRead failed: device pointer lookup failure\nbacktrace"
    with pytest.raises(StorageError, match=r"blocks: cuFileRead failed: device pointer lookup failure$"):
        engine.read(file, batch(out, [3], in_place=True)).result()
    gds_here.fails = ""
    engine.read(file, batch(out, [3], in_place=True)).result()
    assert out[0].tolist() == [3] * BLOCK
    engine.close()


def test_gds_leaves_memory_of_the_host_to_threads(
    gds_here: type[StandInGdsFile], file: PageFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gds, "DEVICE", "cuda")
    engine = build_engine("gds", n_threads=2)
    out = np.zeros((4, BLOCK), np.uint8)
    engine.read(file, batch(out, [3, 1, 4, 1], in_place=True)).result()
    engine.close()
    assert (out[:, 5].tolist(), gds_here.opened) == ([3, 1, 4, 1], 0)


@pytest.mark.parametrize(
    ("probe", "reason"),
    [("pass", ""), ("import sys; sys.exit('cuFile: 5001')", "cuFile: 5001"), ("raise OSError(1)", "1")],
)
def test_a_probe_says_why_gds_cannot_be_used(
    probe: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gds.why_no_gds.__wrapped__(tmp_path) == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gds, "_PROBE", probe)
    found = gds.why_no_gds.__wrapped__(tmp_path / "not made yet")
    assert (reason in found, bool(found)) == (True, bool(reason))
    assert list(tmp_path.iterdir()) == []


def test_a_probe_of_gds_that_hangs_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gds, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(gds, "_PROBE_S", 0.2)
    assert "timed out" in gds.why_no_gds.__wrapped__(tmp_path)
