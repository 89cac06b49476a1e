"""Write-behind: pages wait in open extents, full extents go to writer threads, pages stay readable all the while."""

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_futures

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .aligned import aligned_empty
from .errors import StorageError
from .format import Checksums, page_checksums
from .page_file import PageFile, storage_error, write_all

N_WRITERS = 2
Int64Array = NDArray[np.int64]


class Extent:
    """A run of consecutive pages of one layer in aligned memory, ``memory`` uint8 [capacity, page_stride]."""

    def __init__(self, file: PageFile, first: int, memory: Tensor) -> None:
        self.file = file
        self.first = first
        self.n_pages = 0
        self.memory = memory
        self.write: Future[None] | None = None

    @property
    def pages(self) -> Tensor:
        """The pages without their padding, uint8 [n_pages, n_slices, slice_bytes], a view."""
        layout = self.file.layout
        filled = self.memory[: self.n_pages, : layout.page_bytes]
        return filled.view(self.n_pages, layout.n_slices, layout.slice_bytes)

    @property
    def n_free(self) -> int:
        return len(self.memory) - self.n_pages

    def take(self, pages: Tensor) -> Checksums:
        """Copy ``pages``, uint8 [n <= n_free, n_slices, slice_bytes], behind those already here; their checksums."""
        first = self.n_pages
        self.n_pages += len(pages)
        self.pages[first:].copy_(pages)
        return page_checksums(self.pages[first:].numpy())

    def write_out(self) -> None:
        """Write every page to its place in the file; runs on a writer thread."""
        layout = self.file.layout
        view = self.memory[: self.n_pages].view(-1).numpy().data
        write_all(self.file.fd, view, layout.page_offset(self.first))


class WriteBehind:
    """The pages of all layers that are not on disk yet.

    Safety: all bookkeeping happens on the store's calling thread. A writer thread only reads the memory of an extent
    that was submitted, and a submitted extent is never changed; its memory is reused only after its future is done and
    seen by the calling thread. A failed extent keeps its memory, so its pages stay readable, and it is handed to a
    writer again by ``flush``. At most ``max_in_flight_bytes`` are submitted at once: who submits more waits for the
    oldest. Open extents come on top, one per layer.
    """

    def __init__(self, files: list[PageFile], *, extent_bytes: int, max_in_flight_bytes: int, pinned: bool) -> None:
        stride = files[0].layout.page_stride
        self._files = files
        self._pinned = pinned
        self._extent_pages = max(1, extent_bytes // stride)
        self._max_in_flight = max(N_WRITERS, max_in_flight_bytes // (self._extent_pages * stride))
        self._open: list[Extent | None] = [None] * len(files)
        self._pending: list[list[Extent]] = [[] for _ in files]
        self._in_flight: deque[tuple[int, Extent]] = deque()
        self._failed: list[tuple[int, Extent]] = []
        self._unreported: StorageError | None = None
        self._last_failure: StorageError | None = None
        self._idle: list[Tensor] = []
        self._writers = ThreadPoolExecutor(N_WRITERS, thread_name_prefix="kvoffload-write")

    def take(self, layer: int, first: int, pages: Tensor) -> Checksums:
        """Take as many ``pages`` as one extent has room for, at least one; the checksums of those taken.

        They become pages ``first`` and following of the layer, whose file must have room. Raises, and takes none,
        while pages wait in memory for a disk that refused them.
        """
        self._refuse_after_failure()
        extent = self._open_extent(layer, first)
        checksums = extent.take(pages[: extent.n_free])
        if not extent.n_free:
            self._submit(layer)
        return checksums

    def memory_of(self, layer: int, page_ids: Int64Array) -> list[tuple[Int64Array, Extent]]:
        """For pages not on disk yet: positions in ``page_ids`` and the extent that has them."""
        self._reap()
        extents = [*self._pending[layer], *filter(None, [self._open[layer]])]
        found = []
        for extent in extents:
            inside = (page_ids >= extent.first) & (page_ids < extent.first + extent.n_pages)
            if inside.any():
                found.append((np.flatnonzero(inside), extent))
        return found

    def raise_failure(self) -> None:
        """Raise what a write failed with since the last call, once."""
        self._reap()
        error, self._unreported = self._unreported, None
        if error is not None:
            raise error

    def _refuse_after_failure(self) -> None:
        self.raise_failure()
        if self._failed and self._last_failure is not None:
            raise self._last_failure

    def flush(self) -> None:
        """Write what failed again, and the rest; return when every page is written.

        Raises, and keeps the pages in memory, when one cannot be. A failure that the second try heals is not raised.
        """
        self._reap()
        self._unreported = None
        retry, self._failed = self._failed, []
        for layer, extent in retry:
            self._start(layer, extent)
        for layer in range(len(self._open)):
            self._submit(layer)
        self._drain(0)
        self.raise_failure()

    def close(self) -> None:
        """Wait for the writers and drop what is still in memory."""
        self._writers.shutdown(wait=True)
        self._open = [None] * len(self._files)
        self._pending = [[] for _ in self._files]
        self._in_flight.clear()
        self._idle.clear()

    def _open_extent(self, layer: int, first: int) -> Extent:
        extent = self._open[layer]
        if extent is None:
            extent = self._open[layer] = Extent(self._files[layer], first, self._memory())
        return extent

    def _memory(self) -> Tensor:
        if self._idle:
            return self._idle.pop()
        stride = self._files[0].layout.page_stride
        memory = aligned_empty(self._extent_pages * stride, pinned=self._pinned).view(self._extent_pages, stride)
        memory[:, self._files[0].layout.page_bytes :] = 0
        return memory

    def _submit(self, layer: int) -> None:
        """Hand the layer's open extent to a writer, after making room among those in flight."""
        extent, self._open[layer] = self._open[layer], None
        if extent is None:
            return
        self._pending[layer].append(extent)
        self._start(layer, extent)

    def _start(self, layer: int, extent: Extent) -> None:
        self._drain(self._max_in_flight - 1)
        extent.write = self._writers.submit(extent.write_out)
        self._in_flight.append((layer, extent))

    def _drain(self, n_left: int) -> None:
        """Wait for the oldest writes until at most ``n_left`` are in flight."""
        while len(self._in_flight) > n_left:
            oldest = self._in_flight[0][1].write
            assert oldest is not None
            wait_futures([oldest])
            self._reap()

    def _reap(self) -> None:
        """Take finished writes off the books, oldest first; what failed stays in memory."""
        while self._in_flight:
            layer, extent = self._in_flight[0]
            assert extent.write is not None
            if not extent.write.done():
                return
            self._in_flight.popleft()
            self._settle(layer, extent, extent.write.exception())

    def _settle(self, layer: int, extent: Extent, error: BaseException | None) -> None:
        if error is None:
            self._pending[layer].remove(extent)
            if len(self._idle) < self._max_in_flight + len(self._files):
                self._idle.append(extent.memory)
            return
        if not isinstance(error, OSError):
            raise error
        n_bytes = extent.n_pages * extent.file.layout.page_stride
        self._failed.append((layer, extent))
        self._last_failure = storage_error(error, extent.file.path, n_bytes)
        self._unreported = self._unreported or self._last_failure


def sync(files: list[PageFile]) -> None:
    """Return when the disk has what was written (fdatasync)."""
    for file in files:
        try:
            os.fdatasync(file.fd)
        except OSError as error:
            raise storage_error(error, file.path, 0) from error
