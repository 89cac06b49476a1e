"""The contract of a read engine, and the batches that it is given."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_futures
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..aligned import aligned_empty, round_down, round_up
from ..errors import IntegrityError
from ..format import HEADER_BYTES
from ..page_file import PageFile, storage_error
from ..plan import Int64Array, ReadPlan

Bytes = NDArray[np.uint8]


class Scratch:
    """Aligned memory of one worker, grown to the largest range it was asked for."""

    def __init__(self) -> None:
        self._memory: Bytes = np.empty(0, np.uint8)

    def view(self, n_bytes: int) -> Bytes:
        """``n_bytes`` that start at a multiple of 4096; the next call may hand out the same bytes."""
        if len(self._memory) < n_bytes:
            self._memory = aligned_empty(round_up(n_bytes)).numpy()
        return self._memory[:n_bytes]


class ReadJob(NamedTuple):
    """Read ``n_bytes`` from ``offset``; the bytes from ``starts[i]`` on belong in ``targets[i]``.

    Without ``starts`` the disk may write into the targets, which are the range. Otherwise the range goes through the
    worker's scratch memory. A tuple, as every slice of every step may be one.
    """

    offset: int
    n_bytes: int
    targets: Sequence[memoryview]
    starts: Sequence[int] | None

    def buffers(self, scratch: Scratch) -> Sequence[memoryview]:
        """Where the disk shall put the range."""
        return self.targets if self.starts is None else [scratch.view(self.n_bytes).data]

    def finish(self, buffers: Sequence[memoryview], n_read: int, file: PageFile) -> None:
        """Check that all bytes came and copy them from scratch memory; ``buffers`` as ``buffers()`` gave them."""
        if n_read != self.n_bytes:
            raise file_ends(file, self.offset, n_read, self.n_bytes)
        if self.starts is None:
            return
        for target, start in zip(self.targets, self.starts, strict=True):
            target[:] = buffers[0][start : start + len(target)]


def file_ends(file: PageFile, offset: int, n_read: int, n_bytes: int) -> IntegrityError:
    """That a file ends within a read of ``n_bytes``; ``page`` is the first of the file's own that is not there."""
    page = (offset + n_read - HEADER_BYTES) // file.layout.page_stride
    return IntegrityError(f"{file.path}: {n_read} bytes at {offset}, expected {n_bytes}", page=max(page, 0))


@dataclass(frozen=True, eq=False)
class ReadBatch:
    """Ranges of one file and where they go: slice j of the plan, ``slice_bytes`` long, to ``memory[places[j]:]``.
    Memory is uint8 [n], places int64 [U]. ``in_place`` says that the disk may write there: every range is its slices
    and nothing else, at most 1024 of them, and aligned as the file needs it."""

    plan: ReadPlan
    memory: Tensor
    places: Int64Array
    slice_bytes: int
    in_place: bool

    def __len__(self) -> int:
        return len(self.plan.offsets)

    def jobs(self) -> list[ReadJob]:
        """The ranges one by one."""
        plan, view, size = self.plan, self.memory.numpy().data, self.slice_bytes
        targets = [view[place : place + size] for place in self.places.tolist()]
        firsts, starts = plan.firsts.tolist(), plan.starts.tolist()
        ranges = zip(plan.offsets.tolist(), plan.sizes.tolist(), firsts[:-1], firsts[1:], strict=True)
        return [
            ReadJob(offset, n_bytes, targets[first:end], None if self.in_place else starts[first:end])
            for offset, n_bytes, first, end in ranges
        ]


class Filling:
    """Buffers that are filled from ``offset`` on by as many reads as it takes. A read that was short is gone on with at
    the last whole block, as direct I/O needs it; one that brings nothing new is the end of the file."""

    def __init__(self, buffers: Sequence[memoryview], offset: int) -> None:
        self.buffers, self._offset, self.n_read = buffers, offset, 0
        self._n_wanted = sum(len(buffer) for buffer in buffers)

    def next_read(self) -> tuple[list[memoryview], int]:
        """Where the next read puts its bytes, and its offset in the file."""
        done = round_down(self.n_read)
        return _behind(self.buffers, done), self._offset + done

    def goes_on(self, n_bytes: int) -> bool:
        """Whether another read has to follow the one that brought ``n_bytes``."""
        before, self.n_read = self.n_read, max(self.n_read, round_down(self.n_read) + n_bytes)
        return before < self.n_read < self._n_wanted


def read_fully(fd: int, buffers: Sequence[memoryview], offset: int, n_wanted: int) -> int:
    """``preadv`` until the buffers, ``n_wanted`` bytes, are full or the file ends; bytes read."""
    n_read = os.preadv(fd, buffers, offset)
    if n_read == n_wanted:
        return n_read
    filling = Filling(buffers, offset)
    while filling.goes_on(n_read):
        n_read = os.preadv(fd, *filling.next_read())
    return filling.n_read


def _behind(buffers: Sequence[memoryview], n_bytes: int) -> list[memoryview]:
    """The buffers without their first ``n_bytes``."""
    rest = []
    for buffer in buffers:
        if n_bytes < len(buffer):
            rest.append(buffer[n_bytes:])
        n_bytes = max(n_bytes - len(buffer), 0)
    return rest


class PendingRead:
    """A batch under way; one or a few futures for all of it."""

    def __init__(self, file: PageFile, futures: Sequence[Future[None]]) -> None:
        self._file = file
        self._futures = futures

    def done(self, timeout_s: float | None) -> bool:
        """Whether all of it is over, waiting for it at most that long (None: as long as it takes)."""
        return not wait_futures(self._futures, timeout_s).not_done

    def result(self) -> None:
        """Return when nobody writes into the memory any more; then raise what the first failed read failed with."""
        wait_futures(self._futures)
        for future in self._futures:
            error = future.exception()
            if isinstance(error, OSError):
                raise storage_error(error, self._file.path, 0) from error
            if error is not None:
                raise error


class Engine(ABC):
    """Reads ranges of open files. One thread calls it; its own threads never touch anything but a batch's slices."""

    name: str
    depth: int
    """How many reads are under way at once, at most."""
    on_device = False
    """Whether memory of a device may be read into, and should be."""

    @abstractmethod
    def read(self, file: PageFile, batch: ReadBatch) -> PendingRead:
        """Start reading all ranges, in any order; the batch may be empty. Its memory must stay alive until
        ``result()``."""

    @abstractmethod
    def close(self) -> None:
        """Finish what is under way, then give back threads and memory. A second call does nothing."""
