"""The default engine: positioned vector reads on a fixed set of threads, each draining a share of the batch."""

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from ..page_file import PageFile
from .base import Engine, PendingRead, ReadBatch, ReadJob, Scratch, read_fully


class ThreadsEngine(Engine):
    """``preadv`` on ``n_threads`` threads; one future per thread and batch, not per job.

    Safety: the jobs of a batch wait in a deque, whose ``popleft`` is atomic, so every job is read once. Scratch memory
    is thread-local. The executor joins its threads at interpreter exit, also when ``close`` was forgotten.
    """

    name = "threads"

    def __init__(self, n_threads: int) -> None:
        self.depth = n_threads
        self._executor = ThreadPoolExecutor(n_threads, thread_name_prefix="kvoffload-read")
        self._local = threading.local()

    def read(self, file: PageFile, batch: ReadBatch) -> PendingRead:
        waiting = deque(batch.jobs())
        n_shares = min(self.depth, len(batch))
        return PendingRead(file, [self._executor.submit(self._drain, file, waiting) for _ in range(n_shares)])

    def close(self) -> None:
        self._executor.shutdown(wait=True)

    def _drain(self, file: PageFile, waiting: deque[ReadJob]) -> None:
        scratch = self._scratch()
        while True:
            try:
                job = waiting.popleft()
            except IndexError:
                return
            buffers = job.buffers(scratch)
            job.finish(buffers, read_fully(file.fd, buffers, job.offset, job.n_bytes), file)

    def _scratch(self) -> Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        scratch: Scratch = self._local.scratch
        return scratch
