"""The ``uring`` engine: one io_uring ring through the ``liburing`` binding, many reads in flight from one thread."""

import functools
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import IntegrityError
from ..page_file import PageFile
from .base import Engine, PendingRead, ReadBatch, ReadJob, Scratch

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
    try:
        child = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the probe could not run: {error}"
    if child.returncode == 0:
        return ""
    if child.returncode == -signal.SIGILL:
        return "this build of liburing uses CPU instructions that this machine lacks (SIGILL)"
    if child.returncode < 0:
        return f"io_uring_queue_init killed the probe ({signal.Signals(-child.returncode).name})"
    return (child.stderr.strip().splitlines() or [f"the probe ended with {child.returncode}"])[-1]


class UringEngine(Engine):
    """Up to 32 ``readv`` in flight on one ring; one future per batch.

    Safety: the ring, its eventfd and the slots' scratch memory belong to the only thread of the executor; batches run
    on it one after another. A slot is reused after its completion was seen, and a batch ends, also a failed one, when
    all its reads have completed, so the kernel never writes into memory that was given back. The binding holds the
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


class _RingReader:
    """The ring and what it needs; used by one thread at a time."""

    def __init__(self) -> None:
        import liburing  # an optional dependency, and one that may not even load

        self._liburing: Any = liburing
        self._ring = liburing.Ring()
        liburing.io_uring_queue_init(RING_ENTRIES, self._ring)
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC)
        liburing.io_uring_register_eventfd(self._ring, self._eventfd)
        self._scratch = [Scratch() for _ in range(RING_ENTRIES)]
        self._closer = weakref.finalize(self, _close_ring, liburing, self._ring, self._eventfd)

    def run(self, file: PageFile, jobs: list[ReadJob]) -> None:
        """Read all jobs; after a failure start no more, wait for those in flight, then raise it."""
        idle = list(range(RING_ENTRIES))
        flying: dict[int, tuple[ReadJob, Sequence[memoryview], object]] = {}
        failure: Exception | None = None
        while flying or (jobs and failure is None):
            while jobs and idle and failure is None:
                slot = idle.pop()
                flying[slot] = self._prepare(slot, file, jobs.pop())
            self._liburing.io_uring_submit(self._ring)
            os.eventfd_read(self._eventfd)
            for slot, n_read in self._completed():
                job, buffers, _ = flying.pop(slot)
                idle.append(slot)
                failure = failure or _finish(job, buffers, n_read, file)
        if failure is not None:
            raise failure

    def close(self) -> None:
        self._closer()

    def _prepare(self, slot: int, file: PageFile, job: ReadJob) -> tuple[ReadJob, Sequence[memoryview], object]:
        """Queue one read; what is returned must live until its completion."""
        buffers = job.buffers(self._scratch[slot])
        iovec = self._liburing.Iovec(list(buffers))
        sqe = self._liburing.io_uring_get_sqe(self._ring)
        self._liburing.io_uring_prep_readv(sqe, file.fd, iovec, job.offset)
        sqe.user_data = slot
        return job, buffers, iovec

    def _completed(self) -> list[tuple[int, int | OSError]]:
        """Slots that completed, with bytes read or the error. Only ``cqe[0]`` is used: the binding does not wrap."""
        done: list[tuple[int, int | OSError]] = []
        cqe = self._liburing.Cqe()
        for _ in range(self._liburing.io_uring_cq_ready(self._ring)):
            self._liburing.io_uring_wait_cqe(self._ring, cqe)
            done.append((cqe[0].user_data, _result(cqe[0])))
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


def _finish(job: ReadJob, buffers: Sequence[memoryview], n_read: int | OSError, file: PageFile) -> Exception | None:
    if isinstance(n_read, OSError):
        return n_read
    try:
        job.finish(buffers, n_read, file)
    except IntegrityError as error:
        return error
    return None
