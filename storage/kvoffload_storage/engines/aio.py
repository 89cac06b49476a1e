"""The ``aio`` engine: Linux's asynchronous reads (io_submit) by libc alone; numpy makes a batch's requests at once."""

import ctypes
import errno
import functools
import os
import platform
import sys
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..aligned import aligned_empty
from ..errors import IntegrityError
from ..page_file import PageFile
from .base import Engine, PendingRead, ReadBatch, read_fully
from .probe import why_not

DEPTH = 64
_SHIFT = 32  # a request's number is its batch's number and, below it, the bytes that it reads
_SIZE = (1 << _SHIFT) - 1
_PREADV = 7
_CALLS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}  # io_setup, io_destroy, io_submit, io_getevents
_REQUEST = np.dtype(
    [("number", "<u8"), ("key", "<u4"), ("rw_flags", "<u4"), ("opcode", "<u2"), ("priority", "<i2"), ("fd", "<u4"),
     ("buffers", "<u8"), ("n_buffers", "<u8"), ("offset", "<i8"), ("reserved", "<u8"), ("flags", "<u4"),
     ("event_fd", "<u4")]
)  # fmt: skip
_EVENT = np.dtype([("number", "<u8"), ("request", "<u8"), ("n_read", "<i8"), ("second", "<i8")])

# In a process of its own: a seccomp filter may answer io_setup with a kill.
_PROBE = "import ctypes, os, sys; c = ctypes.CDLL(None, use_errno=True); x = ctypes.c_ulong(); "
_PROBE += "sys.exit(os.strerror(ctypes.get_errno()) if c.syscall(int(sys.argv[1]), 8, ctypes.byref(x)) else 0)"


@functools.cache
def why_no_aio() -> str:
    """Why io_submit cannot be used here, or "" if it can; the answer costs one child process, once."""
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        return f"no system call numbers for {sys.platform} on {platform.machine()}"
    return why_not("-I", "-S", "-c", _PROBE, str(_CALLS[platform.machine()][0]))


class AioEngine(Engine):
    """Up to 64 reads in flight; one future per batch.

    Safety: the context and what is in flight belong to the only thread of the executor. A task ends when its own batch
    is over; requests of later batches that it started meanwhile are found by their own tasks. The kernel writes into a
    batch's memory only between its first submit and the end of its task, also of a batch that failed.
    """

    name = "aio"
    depth = DEPTH

    def __init__(self, n_threads: int) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kvoffload-aio")
        self._reader = _Reader()

    def read(self, file: PageFile, batch: ReadBatch) -> PendingRead:
        if not len(batch):
            return PendingRead(file, [])
        return PendingRead(file, [self._executor.submit(self._reader.run, self._reader.ask(file, batch))])

    def close(self) -> None:
        self._executor.shutdown(wait=True)
        self._reader.close()


class _Batch:
    """The kernel's requests for a batch, and how far they are."""

    def __init__(self, file: PageFile, batch: ReadBatch, number: int) -> None:
        plan, n = batch.plan, len(batch)
        self.file, self.batch, self.number = file, batch, number
        self.n_wanted, self.n_started, self.n_done = n, 0, 0
        self.failure: Exception | None = None
        self._scratch = aligned_empty(0 if batch.in_place else plan.n_bytes).numpy()
        self._starts = np.cumsum(plan.sizes) - plan.sizes  # of each range in scratch memory
        if batch.in_place:
            places, sizes = batch.memory.data_ptr() + batch.places, np.full(len(batch.places), batch.slice_bytes)
            firsts, counts = plan.firsts[:-1], np.diff(plan.firsts)
        else:
            places, sizes = self._scratch.ctypes.data + self._starts, plan.sizes
            firsts, counts = np.arange(n), np.ones(n, np.int64)
        self._vectors = np.stack([places, sizes], 1)
        self._requests = np.zeros(n, _REQUEST)
        self._requests["number"] = (number << _SHIFT) + plan.sizes
        self._requests["opcode"], self._requests["fd"] = _PREADV, file.fd
        self._requests["buffers"] = self._vectors.ctypes.data + 16 * firsts
        self._requests["n_buffers"], self._requests["offset"] = counts, plan.offsets
        self._pointers = self._requests.ctypes.data + _REQUEST.itemsize * np.arange(n)

    @property
    def n_left(self) -> int:
        return self.n_wanted - self.n_started

    @property
    def next_pointer(self) -> int:
        return int(self._pointers.ctypes.data) + 8 * self.n_started

    @property
    def is_over(self) -> bool:
        return self.n_done == self.n_wanted

    def fail(self, error: Exception) -> None:
        """Start nothing more."""
        self.failure = self.failure or error
        self.n_wanted = self.n_started

    def finish(self) -> None:
        """Copy from scratch memory, or raise what a request failed with."""
        if self.failure is not None:
            raise self.failure
        if not self.batch.in_place:
            for job, start in zip(self.batch.jobs(), self._starts.tolist(), strict=True):
                job.finish([self._scratch[start : start + job.n_bytes].data], job.n_bytes, self.file)

    def mend(self, request: int, n_read: int) -> None:
        """The request at that address failed, or came short: then it is read again, waiting."""
        if n_read < 0:
            return self.fail(OSError(-n_read, os.strerror(-n_read)))
        i = (request - int(self._pointers[0])) // _REQUEST.itemsize
        job, start = self.batch.jobs()[i], int(self._starts[i])
        buffers = job.targets if self.batch.in_place else [self._scratch[start : start + job.n_bytes].data]
        try:
            job.finish(buffers, read_fully(self.file.fd, buffers, job.offset, job.n_bytes), self.file)
        except (OSError, IntegrityError) as error:
            self.fail(error)


class _Reader:
    """The kernel's context and the batches in it. ``ask`` is for the engine's caller, the rest for one thread."""

    def __init__(self) -> None:
        self._kernel = _Kernel(DEPTH)
        self._waiting: deque[_Batch] = deque()
        self._flying: dict[int, _Batch] = {}
        self._n_flying, self._n_asked = 0, 0
        self._events = np.zeros(DEPTH, _EVENT)
        self.close = weakref.finalize(self, self._kernel.close)

    def ask(self, file: PageFile, batch: ReadBatch) -> _Batch:
        self._n_asked += 1
        asked = _Batch(file, batch, self._n_asked)
        self._waiting.append(asked)
        return asked

    def run(self, mine: _Batch) -> None:
        """Read on until that batch is over."""
        while not mine.is_over:
            self._start()
            if self._n_flying:
                self._reap()
        self._flying.pop(mine.number, None)
        mine.finish()

    def _start(self) -> None:
        """Fill the kernel's queue."""
        while self._waiting and self._n_flying < DEPTH:
            batch = self._waiting[0]
            self._flying[batch.number] = batch
            n = self._submit(batch, min(batch.n_left, DEPTH - self._n_flying))
            batch.n_started += n
            self._n_flying += n
            if not batch.n_left:
                self._waiting.popleft()
            elif n == 0:  # the kernel is short of something that those under way will give back
                return

    def _submit(self, batch: _Batch, n: int) -> int:
        """How many of the batch's next ``n`` requests were started; one that cannot start fails its batch."""
        try:
            return self._kernel.submit(batch.next_pointer, n) if n else 0
        except OSError as error:
            if error.errno != errno.EAGAIN or not self._n_flying:
                batch.fail(error)
            return 0

    def _reap(self) -> None:
        """Wait for a quarter of what is under way: waking for every single one would cost more than it hides."""
        n = self._kernel.wait(max(self._n_flying // 4, 1), self._events)
        self._n_flying -= n
        for number, request, n_read, _ in self._events[:n].tolist():
            batch = self._flying[number >> _SHIFT]
            batch.n_done += 1
            if n_read != number & _SIZE:
                batch.mend(request, n_read)


class _Kernel:
    """The four system calls, which glibc does not have; ctypes lets other threads run meanwhile."""

    def __init__(self, depth: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype, self._libc.syscall.argtypes = ctypes.c_long, [ctypes.c_long] * 6
        self._setup, self._destroy, self._submit, self._getevents = _CALLS[platform.machine()]
        context = ctypes.c_ulong()
        self._call(self._setup, depth, ctypes.addressof(context))
        self._context = context.value

    def submit(self, pointers: int, n: int) -> int:
        """How many of ``n`` requests were started; BlockingIOError when the kernel can take none now."""
        return self._call(self._submit, self._context, n, pointers)

    def wait(self, least: int, events: NDArray[np.void]) -> int:
        """Fill ``events`` from the front when ``least`` requests are over; how many are."""
        while True:
            try:
                return self._call(self._getevents, self._context, least, len(events), events.ctypes.data, 0)
            except InterruptedError:
                continue

    def close(self) -> None:
        self._call(self._destroy, self._context)

    def _call(self, number: int, *arguments: int) -> int:
        result = int(self._libc.syscall(number, *arguments, *[0] * (5 - len(arguments))))
        if result < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return result
