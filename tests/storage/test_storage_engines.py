"""Engines beyond the store contract: scratch and vector limits, and uring's order of calls on a stand-in ring."""

import asyncio
import errno
import os
import subprocess
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from blocks import BLOCK, batch
from kvoffload_storage import CapacityError, IntegrityError, StorageError, UnavailableError
from kvoffload_storage.aligned import aligned_empty
from kvoffload_storage.engines import Engine, ReadBatch, async_files, build_engine, choice, uring
from kvoffload_storage.page_file import PageFile
from kvoffload_storage.plan import lone_reads


class StandInRing(types.ModuleType):
    """The calls of the liburing binding that the engine uses; completions come last first, all at one submit."""

    def __init__(self) -> None:
        super().__init__("liburing")
        self.queued: list[types.SimpleNamespace] = []
        self.done: list[types.SimpleNamespace] = []
        self.most_in_flight = 0
        self.most_bytes = 1 << 30  # that one read brings
        self.exits = 0

    def Ring(self) -> object:  # noqa: N802
        return object()

    def Iovec(self, buffers: list[memoryview]) -> list[memoryview]:  # noqa: N802
        return buffers

    def Cqe(self) -> list[object]:  # noqa: N802
        return [None]

    def io_uring_queue_init(self, entries: int, ring: object) -> int:
        return 0

    def io_uring_queue_exit(self, ring: object) -> None:
        self.exits += 1

    def io_uring_register_eventfd(self, ring: object, fd: int) -> int:
        self.eventfd = fd
        return 0

    def io_uring_get_sqe(self, ring: object) -> types.SimpleNamespace:
        self.queued.append(types.SimpleNamespace())
        return self.queued[-1]

    def io_uring_prep_readv(self, sqe: types.SimpleNamespace, fd: int, iovec: list[memoryview], offset: int) -> None:
        sqe.fd, sqe.iovec, sqe.offset = fd, iovec, offset

    def io_uring_submit(self, ring: object) -> int:
        self.most_in_flight = max(self.most_in_flight, len(self.queued))
        n = len(self.queued)
        for sqe in reversed(self.queued):
            self.done.append(Completion(sqe, self.most_bytes))
            os.eventfd_write(self.eventfd, 1)
        self.queued.clear()
        return n

    def io_uring_cq_ready(self, ring: object) -> int:
        return len(self.done)

    def io_uring_wait_cqe(self, ring: object, cqe: list[object]) -> int:
        cqe[0] = self.done[0]
        return 0

    def io_uring_cq_advance(self, ring: object, n: int) -> None:
        del self.done[:n]


class Completion(types.SimpleNamespace):
    """Reads when it is asked for its result, as the binding raises there."""

    def __init__(self, sqe: types.SimpleNamespace, most_bytes: int) -> None:
        super().__init__(user_data=sqe.user_data, sqe=sqe, most_bytes=most_bytes)

    @property
    def res(self) -> int:
        return os.preadv(self.sqe.fd, cut(self.sqe.iovec, self.most_bytes), self.sqe.offset)


def cut(buffers: list[memoryview], n_bytes: int) -> list[memoryview]:
    """The first ``n_bytes`` of the buffers."""
    first = []
    for buffer in buffers:
        first.append(buffer[: max(n_bytes, 0)])
        n_bytes -= len(buffer)
    return first


class SlowRing(StandInRing):
    """One completion every time that the reader waits; submits of the first ring fail from the second on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.in_kernel: list[types.SimpleNamespace] = []
        self.n_submits = 0
        monkeypatch.setattr(os, "eventfd_read", self.wait)

    def io_uring_submit(self, ring: object) -> int:
        self.n_submits += 1
        if self.n_submits > 1 and not self.exits:
            raise OSError(errno.EBUSY, "no")
        n = len(self.queued)
        self.in_kernel += self.queued
        self.queued.clear()
        return n

    def io_uring_queue_exit(self, ring: object) -> None:
        super().io_uring_queue_exit(ring)
        self.queued.clear()

    def wait(self, fd: int) -> int:
        self.done.append(Completion(self.in_kernel.pop(0), self.most_bytes))
        return 1


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> StandInRing:
    stand_in = StandInRing()
    monkeypatch.setitem(sys.modules, "liburing", stand_in)
    monkeypatch.setattr(choice, "why_no_uring", lambda: "")
    return stand_in


@pytest.mark.parametrize("in_place", [True, False])
def test_a_ring_reads_more_jobs_than_it_has_entries(ring: StandInRing, file: PageFile, in_place: bool) -> None:
    engine = build_engine("uring", n_threads=1)
    out = np.zeros((100, BLOCK), np.uint8)
    blocks = list(range(99, -1, -1))
    engine.read(file, batch(out, blocks, in_place=in_place)).result()
    engine.read(file, batch(out, [], in_place=True)).result()
    engine.close()
    engine.close()
    assert out[:, 0].tolist() == out[:, -1].tolist() == blocks
    assert ring.most_in_flight == uring.RING_ENTRIES
    assert ring.exits == 1


def test_a_ring_that_fails_ends_its_batch_and_reads_the_next(ring: StandInRing, file: PageFile) -> None:
    engine = build_engine("uring", n_threads=1)
    out = np.zeros((100, BLOCK), np.uint8)
    jobs = batch(out, list(range(100)), in_place=True)
    with pytest.raises(IntegrityError, match="0 bytes at 4096000, expected 4096"):
        engine.read(file, batch(out, [*range(99), 1000], in_place=True)).result()
    with pytest.raises(StorageError, match="blocks: Invalid argument"):
        engine.read(file, batch(out[:1], [-1], in_place=True)).result()
    engine.read(file, jobs).result()
    assert out[:, 7].tolist() == list(range(100))
    engine.close()


@pytest.mark.parametrize("most_bytes", [BLOCK, BLOCK + 100, 3 * BLOCK - 1])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_ring_goes_on_after_short_reads(ring: StandInRing, file: PageFile, most_bytes: int, in_place: bool) -> None:
    ring.most_bytes = most_bytes
    check_runs_of_blocks(build_engine("uring", n_threads=1), file, in_place=in_place)


def check_runs_of_blocks(engine: Engine, file: PageFile, *, in_place: bool) -> None:
    """Forty runs of six blocks, in two pieces each, come whole; one behind the end of the file does not."""
    out = np.zeros((240, BLOCK), np.uint8)
    firsts = [7 * i % 90 for i in range(40)]
    engine.read(file, runs_of_blocks(out, firsts, in_place=in_place)).result()
    assert out[:, 0].tolist() == out[:, -1].tolist() == [b + i for b in firsts for i in range(6)]
    with pytest.raises(IntegrityError, match="8192 bytes at 401408, expected 24576"):
        engine.read(file, runs_of_blocks(out, [98], in_place=in_place)).result()
    engine.close()


def runs_of_blocks(out: np.ndarray, firsts: list[int], *, in_place: bool) -> ReadBatch:
    """Six blocks from block ``firsts[i]`` on, one range of two slices, into rows 6i to 6i + 5 of uint8 [6n, BLOCK]."""
    n, plan = len(firsts), lone_reads(np.array(firsts, np.int64) * BLOCK, 6 * BLOCK)
    rows = np.arange(2 * n)
    plan = replace(plan, firsts=2 * plan.firsts, rows=rows, starts=rows % 2 * 3 * BLOCK)
    return ReadBatch(plan, torch.from_numpy(out.reshape(-1)), rows * 3 * BLOCK, 3 * BLOCK, in_place)


@pytest.mark.parametrize("reason", ["submit", "target"])
def test_a_failed_batch_ends_when_the_kernel_has_left_its_memory(
    monkeypatch: pytest.MonkeyPatch, file: PageFile, reason: str
) -> None:
    ring = SlowRing(monkeypatch)
    monkeypatch.setitem(sys.modules, "liburing", ring)
    monkeypatch.setattr(choice, "why_no_uring", lambda: "")
    engine = build_engine("uring", n_threads=1)
    out = np.zeros((40, BLOCK), np.uint8)
    asked = batch(out, list(range(1, 41)), in_place=reason == "submit")
    if reason == "target":  # the last range is the first to be read, and has no whole slice
        asked.plan.starts[-1] = BLOCK // 2
    with pytest.raises(StorageError if reason == "submit" else ValueError):
        engine.read(file, asked).result()
    assert ring.in_kernel == []
    assert ring.exits == (reason == "submit")
    ring.exits, unread = 1, out[:7].copy()
    again = np.zeros((40, BLOCK), np.uint8)
    engine.read(file, batch(again, list(range(40)), in_place=True)).result()
    assert again[:, 5].tolist() == list(range(40))
    assert np.array_equal(out[:7], unread), "reads of the failed batch were started after it"
    engine.close()


class StandInHandle:
    """The calls of an aiofiles handle, whose reads begin when they may; what was done is noted."""

    def __init__(self, path: Path, files: "StandInFiles") -> None:
        self.file, self.most_bytes = path.open("rb", buffering=0), files.most_bytes
        self.log, self.may_read = files.log, files.may_read

    async def seek(self, offset: int) -> None:
        self.file.seek(offset)

    async def readinto(self, buffer: memoryview) -> int:
        while not self.may_read.is_set():
            await asyncio.sleep(0)
        self.log.append("read")
        return self.file.readinto(buffer[: self.most_bytes]) or 0

    async def close(self) -> None:
        self.log.append("close")
        self.file.close()


class StandInFiles:
    """``aiofiles.open``; the ``fails_at``-th has no descriptor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, most_bytes: int = 1 << 30, fails_at: int = 0) -> None:
        self.most_bytes, self.fails_at, self.n_opened = most_bytes, fails_at, 0
        self.log: list[str] = []
        self.may_read = threading.Event()
        self.may_read.set()
        monkeypatch.setattr(async_files.aiofiles, "open", self.open)

    async def open(self, path: Path, *args: object, **options: object) -> StandInHandle:
        self.n_opened += 1
        if self.n_opened == self.fails_at:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return StandInHandle(path, self)


@pytest.mark.parametrize("most_bytes", [BLOCK, BLOCK + 100, 3 * BLOCK - 1])
@pytest.mark.parametrize("in_place", [True, False])
def test_aiofiles_goes_on_after_short_reads(
    monkeypatch: pytest.MonkeyPatch, file: PageFile, most_bytes: int, in_place: bool
) -> None:
    StandInFiles(monkeypatch, most_bytes=most_bytes)
    check_runs_of_blocks(build_engine("aiofiles", n_threads=2), file, in_place=in_place)


def test_aiofiles_closes_no_handle_that_is_read(monkeypatch: pytest.MonkeyPatch, file: PageFile) -> None:
    files = StandInFiles(monkeypatch)
    files.may_read.clear()
    engine = build_engine("aiofiles", n_threads=2)
    out = np.zeros((4, BLOCK), np.uint8)
    pending = engine.read(file, batch(out, [4, 3, 2, 1], in_place=True))
    threading.Timer(0.05, files.may_read.set).start()
    engine.close()
    assert files.log == ["read"] * 4 + ["close"] * 2
    assert pending.done(0)
    assert out[:, 0].tolist() == [4, 3, 2, 1]


def test_aiofiles_keeps_no_handle_where_descriptors_ran_out(monkeypatch: pytest.MonkeyPatch, file: PageFile) -> None:
    files = StandInFiles(monkeypatch, fails_at=3)
    engine = build_engine("aiofiles", n_threads=4)
    out = np.zeros((1, BLOCK), np.uint8)
    with pytest.raises(CapacityError, match="blocks: Too many open files"):
        engine.read(file, batch(out, [3], in_place=True)).result()
    assert files.log == ["close"] * 2
    engine.read(file, batch(out, [3], in_place=True)).result()
    assert out[0, 0] == 3
    engine.close()


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ("pass", ""),
        ("import os; os.kill(os.getpid(), 4)", "instructions that this machine lacks"),
        ("import os; os.kill(os.getpid(), 31)", "killed the probe (SIGSYS)"),
        ("raise PermissionError(1, 'Operation not permitted')", "PermissionError: [Errno 1] Operation not permitted"),
        ("import sys; sys.exit(3)", "the probe ended with 3"),
    ],
)
def test_a_probe_says_why_io_uring_cannot_be_used(probe: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uring, "_PROBE", probe)
    found = uring.why_no_uring.__wrapped__()
    assert reason in found
    assert bool(reason) == bool(found)


def test_a_probe_that_cannot_run_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.ENOENT, "no interpreter")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert "no interpreter" in uring.why_no_uring.__wrapped__()


def test_an_engine_that_is_blocked_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "why_no_uring", lambda: "blocked here")
    with pytest.raises(UnavailableError, match="engine uring: blocked here"):
        build_engine("uring", n_threads=1)


def test_a_file_that_cannot_be_opened_again_fails_the_read_not_the_engine(file: PageFile) -> None:
    engine = build_engine("aiofiles", n_threads=2)
    out = aligned_empty(BLOCK).numpy()
    aside = file.path.with_name("aside")
    file.path.rename(aside)
    with pytest.raises(StorageError, match="blocks: No such file"):
        engine.read(file, batch(out[None], [3], in_place=True)).result()
    aside.rename(file.path)
    engine.read(file, batch(out[None], [3], in_place=True)).result()
    assert out[0] == 3
    engine.close()
    engine.close()


def test_batches_of_one_file_share_its_lanes(file: PageFile) -> None:
    engine = build_engine("aiofiles", n_threads=3)
    outs = [np.zeros((100, BLOCK), np.uint8) for _ in range(4)]
    pending = [engine.read(file, batch(out, list(range(100)), in_place=True)) for out in outs]
    for read, out in zip(pending, outs, strict=True):
        read.result()
        assert out[:, 9].tolist() == list(range(100))
    engine.close()
