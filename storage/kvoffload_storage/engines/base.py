"""The contract of a read engine, and the jobs that it is given."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_futures
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..aligned import aligned_empty, round_down, round_up
from ..errors import IntegrityError
from ..page_file import PageFile, storage_error

Bytes = NDArray[np.uint8]
IOV_MAX = 1024


class Scratch:
    """Aligned memory of one worker, grown to the largest range it was asked for."""

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, np.uint8)

    def view(self, n_bytes: int) -> Bytes:
        """``n_bytes`` that start at a multiple of 4096; the next call may hand out the same bytes."""
        if len(self._memory) < n_bytes:
            self._memory = aligned_empty(round_up(n_bytes)).numpy()
        return self._memory[:n_bytes]


@dataclass(frozen=True)
class ReadJob:
    """Read ``n_bytes`` from ``offset``; the bytes from ``starts[i]`` on belong in ``targets[i]``.

    ``in_place`` says that the targets, in order, are exactly the range and aligned as the file needs it, so that the
    disk may write into them. Otherwise the range goes through the worker's scratch memory.
    """

    offset: int
    n_bytes: int
    targets: tuple[Bytes, ...]
    starts: tuple[int, ...]
    in_place: bool

    def buffers(self, scratch: Scratch) -> list[memoryview]:
        """Where the disk shall put the range, at most IOV_MAX pieces."""
        if self.in_place and len(self.targets) <= IOV_MAX:
            return [target.data for target in self.targets]
        return [scratch.view(self.n_bytes).data]

    def finish(self, buffers: list[memoryview], n_read: int, file: PageFile) -> None:
        """Check that all bytes came and copy them from scratch memory; ``buffers`` as ``buffers()`` gave them."""
        if n_read != self.n_bytes:
            raise IntegrityError(f"{file.path}: {n_read} bytes at {self.offset}, expected {self.n_bytes}")
        if self.in_place and len(self.targets) <= IOV_MAX:
            return
        scratch = np.frombuffer(buffers[0], np.uint8)
        for target, start in zip(self.targets, self.starts, strict=True):
            target[:] = scratch[start : start + len(target)]


def read_fully(fd: int, buffers: list[memoryview], offset: int) -> int:
    """``preadv`` until the buffers are full or the file ends; bytes read. A short read goes on at the last whole block,
    as direct I/O needs it."""
    n_wanted = sum(len(buffer) for buffer in buffers)
    n_read = os.preadv(fd, buffers, offset)
    while 0 < n_read < n_wanted:
        done = round_down(n_read)
        n_more = os.preadv(fd, _behind(buffers, done), offset + done)
        if done + n_more <= n_read:
            return n_read
        n_read = done + n_more
    return n_read


def _behind(buffers: list[memoryview], n_bytes: int) -> list[memoryview]:
    """The buffers without their first ``n_bytes``."""
    rest = []
    for buffer in buffers:
        if n_bytes < len(buffer):
            rest.append(buffer[n_bytes:])
        n_bytes = max(n_bytes - len(buffer), 0)
    return rest


class PendingRead:
    """A batch under way; one or a few futures for all its jobs."""

    def __init__(self, file: PageFile, futures: Sequence[Future[None]]) -> None:
        self._file = file
        self._futures = futures

    def done(self, timeout_s: float | None) -> bool:
        """Whether all jobs are over, waiting for it at most that long (None: as long as it takes)."""
        return not wait_futures(self._futures, timeout_s).not_done

    def result(self) -> None:
        """Return when no worker touches the targets any more; then raise what the first failed job failed with."""
        wait_futures(self._futures)
        for future in self._futures:
            error = future.exception()
            if isinstance(error, OSError):
                raise storage_error(error, self._file.path, 0) from error
            if error is not None:
                raise error


class Engine(ABC):
    """Reads jobs of open files. One thread calls it; its own threads never touch anything but a job's targets."""

    name: str

    @abstractmethod
    def read(self, file: PageFile, jobs: Sequence[ReadJob]) -> PendingRead:
        """Start reading all jobs, in any order; jobs may be empty. The targets must stay alive until ``result()``."""

    @abstractmethod
    def close(self) -> None:
        """Finish what is under way, then give back threads and memory. A second call does nothing."""
