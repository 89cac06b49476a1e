"""The ``aiofiles`` engine: an event loop on one thread, handles opened for direct I/O, reads into aligned memory."""

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import aiofiles
from aiofiles.threadpool.binary import AsyncFileIO

from ..page_file import PageFile
from .base import Engine, Filling, PendingRead, ReadBatch, ReadJob, Scratch


@dataclass
class Lane:
    """A handle with a file position of its own, and the memory that it reads into."""

    handle: AsyncFileIO
    scratch: Scratch = field(default_factory=Scratch)


class AsyncFilesEngine(Engine):
    """aiofiles handles, at most ``depth`` per file, opened at the first read of the file.

    Safety: everything below ``read`` runs on the loop's thread only. A lane is taken from its file's queue for one
    share of a batch and put back afterwards, so no two reads share a position or scratch memory. The executor serves
    one blocking call per lane. ``close`` waits for the batches under way before it closes a handle, whose number might
    go to another file. The loop's thread knows the loop, not the engine, and stops when the engine is dropped.
    """

    name = "aiofiles"

    def __init__(self, n_threads: int) -> None:
        self.depth = n_threads
        self._executor = ThreadPoolExecutor(n_threads, thread_name_prefix="kvoffload-aiofiles")
        self._loop = asyncio.new_event_loop()
        self._opening = asyncio.Lock()
        self._idle: dict[Path, asyncio.Queue[Lane]] = {}
        self._running: set[Future[None]] = set()
        thread = threading.Thread(target=_run, args=(self._loop,), name="kvoffload-aiofiles-loop", daemon=True)
        thread.start()
        self._stopper = weakref.finalize(self, _stop, self._loop, thread)

    def read(self, file: PageFile, batch: ReadBatch) -> PendingRead:
        if not len(batch):
            return PendingRead(file, [])
        share = asyncio.run_coroutine_threadsafe(self._batch(file, deque(batch.jobs())), self._loop)
        self._running.add(share)
        share.add_done_callback(self._running.discard)
        return PendingRead(file, [share])

    def close(self) -> None:
        if not self._stopper.alive:
            return
        wait(list(self._running))
        asyncio.run_coroutine_threadsafe(self._close_lanes(), self._loop).result()
        self._stopper()
        self._executor.shutdown(wait=True)

    async def _batch(self, file: PageFile, waiting: deque[ReadJob]) -> None:
        idle = await self._lanes_of(file)
        shares = [self._drain(file, waiting, idle) for _ in range(min(self.depth, len(waiting)))]
        outcomes = await asyncio.gather(*shares, return_exceptions=True)
        for error in filter(None, outcomes):
            raise error

    async def _lanes_of(self, file: PageFile) -> asyncio.Queue[Lane]:
        async with self._opening:
            if file.path not in self._idle:
                idle: asyncio.Queue[Lane] = asyncio.Queue()
                try:
                    for _ in range(self.depth):
                        idle.put_nowait(await self._open_lane(file))
                except OSError:  # perhaps for want of descriptors: the next read begins anew
                    while not idle.empty():
                        await idle.get_nowait().handle.close()
                    raise
                self._idle[file.path] = idle
            return self._idle[file.path]

    async def _open_lane(self, file: PageFile) -> Lane:
        opener = _opener(file.direct)
        return Lane(await aiofiles.open(file.path, "rb", buffering=0, opener=opener, executor=self._executor))

    async def _drain(self, file: PageFile, waiting: deque[ReadJob], idle: asyncio.Queue[Lane]) -> None:
        lane = await idle.get()
        try:
            while waiting:
                await _read_one(lane, file, waiting.popleft())
        finally:
            idle.put_nowait(lane)

    async def _close_lanes(self) -> None:
        for idle in self._idle.values():
            while not idle.empty():
                await idle.get_nowait().handle.close()
        self._idle.clear()


async def _read_one(lane: Lane, file: PageFile, job: ReadJob) -> None:
    buffers = job.buffers(lane.scratch)
    filling = Filling(buffers, job.offset)
    while filling.goes_on(await _read_once(lane.handle, *filling.next_read())):
        pass
    job.finish(buffers, filling.n_read, file)


async def _read_once(handle: AsyncFileIO, buffers: list[memoryview], offset: int) -> int:
    """One seek and one ``readinto`` per piece, up to the first that is short; aiofiles has no vector read."""
    await handle.seek(offset)
    n_read = 0
    for buffer in buffers:
        n_more = await handle.readinto(buffer) or 0
        n_read += n_more
        if n_more < len(buffer):
            break
    return n_read


def _opener(direct: bool) -> Callable[[str, int], int]:
    extra = os.O_DIRECT if direct else 0
    return lambda path, flags: os.open(path, flags | extra | os.O_CLOEXEC)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    if threading.current_thread() is not thread:  # the collector may run this on the loop's own thread
        thread.join()
