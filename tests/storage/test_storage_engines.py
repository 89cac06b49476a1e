"""Engines beyond the store contract: scratch and vector limits, and uring's order of calls on a stand-in ring."""

import errno
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kvoffload_storage import IntegrityError, StorageError, UnavailableError
from kvoffload_storage.aligned import aligned_empty
from kvoffload_storage.engines import ReadJob, build_engine, uring
from kvoffload_storage.engines.base import IOV_MAX
from kvoffload_storage.format import PageLayout
from kvoffload_storage.page_file import PageFile

BLOCK = 4096


class StandInRing(types.ModuleType):
    """The calls of the liburing binding that the engine uses; completions come last first, all at one submit."""

    def __init__(self) -> None:
        super().__init__("liburing")
        self.queued: list[types.SimpleNamespace] = []
        self.done: list[types.SimpleNamespace] = []
        self.most_in_flight = 0
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
        for sqe in reversed(self.queued):
            self.done.append(Completion(sqe))
            os.eventfd_write(self.eventfd, 1)
        self.queued.clear()
        return 0

    def io_uring_cq_ready(self, ring: object) -> int:
        return len(self.done)

    def io_uring_wait_cqe(self, ring: object, cqe: list[object]) -> int:
        cqe[0] = self.done[0]
        return 0

    def io_uring_cq_advance(self, ring: object, n: int) -> None:
        del self.done[:n]


class Completion(types.SimpleNamespace):
    """Reads when it is asked for its result, as the binding raises there."""

    def __init__(self, sqe: types.SimpleNamespace) -> None:
        super().__init__(user_data=sqe.user_data, sqe=sqe)

    @property
    def res(self) -> int:
        return os.preadv(self.sqe.fd, self.sqe.iovec, self.sqe.offset)


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> StandInRing:
    stand_in = StandInRing()
    monkeypatch.setitem(sys.modules, "liburing", stand_in)
    monkeypatch.setattr(uring, "why_no_uring", lambda: "")
    return stand_in


@pytest.fixture
def file(tmp_path: Path) -> Iterator[PageFile]:
    """100 blocks, block b filled with b."""
    path = tmp_path / "blocks"
    path.write_bytes(b"".join(bytes([b]) * BLOCK for b in range(100)))
    opened = PageFile(path, os.open(path, os.O_RDWR), PageLayout(1, BLOCK), direct=False)
    yield opened
    opened.close()


def block_jobs(out: np.ndarray, blocks: list[int], *, in_place: bool) -> list[ReadJob]:
    return [ReadJob(b * BLOCK, BLOCK, (out[i],), (0,), in_place) for i, b in enumerate(blocks)]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_ring_reads_more_jobs_than_it_has_entries(ring: StandInRing, file: PageFile, in_place: bool) -> None:
    engine = build_engine("uring", n_threads=1)
    out = np.zeros((100, BLOCK), np.uint8)
    blocks = list(range(99, -1, -1))
    engine.read(file, block_jobs(out, blocks, in_place=in_place)).result()
    engine.read(file, []).result()
    engine.close()
    engine.close()
    assert out[:, 0].tolist() == out[:, -1].tolist() == blocks
    assert ring.most_in_flight == uring.RING_ENTRIES
    assert ring.exits == 1


def test_a_ring_that_fails_ends_its_batch_and_reads_the_next(ring: StandInRing, file: PageFile) -> None:
    engine = build_engine("uring", n_threads=1)
    out = np.zeros((100, BLOCK), np.uint8)
    jobs = block_jobs(out, list(range(100)), in_place=True)
    with pytest.raises(IntegrityError, match="0 bytes at 4096000, expected 4096"):
        engine.read(file, [*jobs, ReadJob(1000 * BLOCK, BLOCK, (out[0],), (0,), True)]).result()
    with pytest.raises(StorageError, match="blocks: Invalid argument"):
        engine.read(file, [ReadJob(-BLOCK, BLOCK, (out[0],), (0,), True)]).result()
    engine.read(file, jobs).result()
    assert out[:, 7].tolist() == list(range(100))
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
    monkeypatch.setattr(uring, "why_no_uring", lambda: "blocked here")
    with pytest.raises(UnavailableError, match="engine uring: blocked here"):
        build_engine("uring", n_threads=1)


def test_more_pieces_than_one_vector_takes_go_through_scratch(file: PageFile) -> None:
    engine = build_engine("threads", n_threads=2)
    out = np.zeros((2 * IOV_MAX, 16), np.uint8)
    starts = tuple(range(0, len(out) * 16, 16))
    engine.read(file, [ReadJob(0, len(out) * 16, tuple(out), starts, True)]).result()
    assert out[:, 0].tolist() == [start // BLOCK for start in starts]
    engine.close()


def test_a_file_that_cannot_be_opened_again_fails_the_read_not_the_engine(file: PageFile) -> None:
    engine = build_engine("aiofiles", n_threads=2)
    out = aligned_empty(BLOCK).numpy()
    aside = file.path.with_name("aside")
    file.path.rename(aside)
    with pytest.raises(StorageError, match="blocks: No such file"):
        engine.read(file, block_jobs(out[None], [3], in_place=True)).result()
    aside.rename(file.path)
    engine.read(file, block_jobs(out[None], [3], in_place=True)).result()
    assert out[0] == 3
    engine.close()
    engine.close()


def test_batches_of_one_file_share_its_lanes(file: PageFile) -> None:
    engine = build_engine("aiofiles", n_threads=3)
    outs = [np.zeros((100, BLOCK), np.uint8) for _ in range(4)]
    pending = [engine.read(file, block_jobs(out, list(range(100)), in_place=True)) for out in outs]
    for read, out in zip(pending, outs, strict=True):
        read.result()
        assert out[:, 9].tolist() == list(range(100))
    engine.close()
