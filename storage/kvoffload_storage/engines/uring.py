"""The ``uring`` engine: one io_uring ring through the ``liburing`` binding, many reads in flight from one thread."""

import errno
import functools
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..page_file import PageFile
from .base import Engine, Filling, PendingRead, ReadBatch, ReadJob, Scratch
from .probe import why_not

RING_ENTRIES = 32

# In a process of its own: a seccomp filter may answer io_uring_setup with a kill, and a liburing wheel compiled for
# another CPU dies of an illegal instruction; neither can be caught here.
_PROBE = """
import liburing
ring = liburing.Ring()
liburing.io_uring_queue_init(8, ring)
liburing.io_uring_queue_exit(ring)
"""


@functools.cache
def why_no_uring() -> str:
    """Why io_uring cannot be used here, or "" if it can; the answer costs one child process, once."""
    return why_not("-c", _PROBE)


class UringEngine(Engine):
    """Up to 32 ``readv`` in flight on one ring; one future per batch.

    Safety: the ring, its eventfd and the slots' scratch memory belong to the only thread of the executor; batches run
    on it one after another. A slot is reused after its completion was seen, and a batch ends, also a failed one, when
    all its reads have completed, so the kernel never writes into memory that was given back; a ring in which a failed
    batch left reads that were not submitted is given up. A short read is gone on with. The binding holds the
    interpreter lock in its calls: the thread therefore sleeps on the eventfd, which does not, and never in the ring.
    """

    name = "uring"
    depth = RING_ENTRIES

    def __init__(self, n_threads: int) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kvoffload-uring")
        self._reader = _RingReader()

    def read(self, file: PageFile, batch: ReadBatch) -> PendingRead:
        return PendingRead(file, [self._executor.submit(self._reader.run, file, batch.jobs())] if len(batch) else [])

    def close(self) -> None:
        self._executor.shutdown(wait=True)
        self._reader.close()


@dataclass
class _Flight:
    """A job under way; what it holds must live until its read has completed."""

    job: ReadJob
    buffers: Sequence[memoryview]
    filling: Filling
    iovec: object = None


class _RingReader:
    """The ring and what it needs; used by one thread at a time."""

    def __init__(self) -> None:
        import liburing  # an optional dependency, and one that may not even load

        self._liburing: Any = liburing
        self._scratch = [Scratch() for _ in range(RING_ENTRIES)]
        self._flying: dict[int, _Flight] = {}  # by slot
        self._queued: list[int] = []  # the slots among them that the kernel does not know yet, in order
        self._open()

    def run(self, file: PageFile, jobs: list[ReadJob]) -> None:
        """Read all jobs; after a failure start no more, wait for those in flight, then raise it."""
        if not self._closer.alive:
            self._open()
        idle = list(range(RING_ENTRIES))
        try:
            while jobs or self._flying:
                while jobs and idle:
                    slot, job = idle.pop(), jobs.pop()
                    buffers = job.buffers(self._scratch[slot])
                    self._ask(slot, _Flight(job, buffers, Filling(buffers, job.offset)), file)
                self._submit()
                for slot, flight, n_read in self._landed():
                    if isinstance(n_read, OSError):
                        raise n_read
                    if flight.filling.goes_on(n_read):
                        self._ask(slot, flight, file)
                    else:
                        flight.job.finish(flight.buffers, flight.filling.n_read, file)
                        idle.append(slot)
        except BaseException:
            self._settle()
            raise

    def close(self) -> None:
        self._closer()

    def _open(self) -> None:
        self._ring, self._eventfd = self._liburing.Ring(), os.eventfd(0, os.EFD_CLOEXEC)
        try:
            self._liburing.io_uring_queue_init(RING_ENTRIES, self._ring)
        except OSError:
            os.close(self._eventfd)
            raise
        self._liburing.io_uring_register_eventfd(self._ring, self._eventfd)
        self._closer = weakref.finalize(self, _close_ring, self._liburing, self._ring, self._eventfd)

    def _ask(self, slot: int, flight: _Flight, file: PageFile) -> None:
        """Queue a flight's next read."""
        buffers, offset = flight.filling.next_read()
        flight.iovec = self._liburing.Iovec(buffers)
        self._flying[slot] = flight
        self._queued.append(slot)
        sqe = self._liburing.io_uring_get_sqe(self._ring)
        self._liburing.io_uring_prep_readv(sqe, file.fd, flight.iovec, offset)
        sqe.user_data = slot

    def _submit(self) -> None:
        del self._queued[: self._liburing.io_uring_submit(self._ring)]
        if len(self._queued) == len(self._flying):  # nothing would ever complete
            raise OSError(errno.EAGAIN, "the ring takes no reads")

    def _settle(self) -> None:
        """After a failure: wait for every read that the kernel knows, and give up a ring in which others are queued,
        since the next submit would start them."""
        while len(self._flying) > len(self._queued):
            self._landed()
        if self._queued:
            self._closer()
        self._flying.clear()
        self._queued.clear()

    def _landed(self) -> list[tuple[int, _Flight, int | OSError]]:
        """Wait for completions: slots, what flew in them, and bytes read or the error. Only ``cqe[0]`` is used: the
        binding does not wrap."""
        os.eventfd_read(self._eventfd)
        done: list[tuple[int, _Flight, int | OSError]] = []
        cqe = self._liburing.Cqe()
        for _ in range(self._liburing.io_uring_cq_ready(self._ring)):
            self._liburing.io_uring_wait_cqe(self._ring, cqe)
            done.append((cqe[0].user_data, self._flying.pop(cqe[0].user_data), _result(cqe[0])))
            self._liburing.io_uring_cq_advance(self._ring, 1)
        return done


def _close_ring(liburing: Any, ring: Any, eventfd: int) -> None:
    liburing.io_uring_queue_exit(ring)
    os.close(eventfd)


def _result(completion: Any) -> int | OSError:
    try:
        return int(completion.res)
    except OSError as error:
        return error
