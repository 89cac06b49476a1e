"""Pages in files: tier "nvme", direct I/O where the disk takes it, write-behind, checksums per page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from .aligned import BLOCK_BYTES, aligned_empty, is_aligned
from .checks import check_page_read, check_pages, check_slice_read
from .directory import StoreDirectory
from .disk import probe_direct
from .engines import PendingRead, ReadJob, build_engine
from .errors import CapacityError, IntegrityError, StorageError, UnavailableError
from .format import Header, PageLayout, checksum, layout_of
from .kept import read_kept, write_kept
from .page_file import PageFile
from .plan import Int64Array, ReadPlan, plan_read
from .store import Moved, Store, StoreShape, Ticket
from .tickets import DoneTicket
from .write_behind import WriteBehind, sync

Direct = Literal["auto", "on", "off"]
IN_FLIGHT_BYTES = 64 << 20
VERIFY_BYTES = 8 << 20


class FileStore(Store):
    """One file per layer in a folder of its own, format as in FORMAT.md.

    ``directory`` None makes a temporary folder, otherwise a new one inside ``directory``; both are removed by
    ``close``, when the store is dropped and at interpreter exit, unless ``keep`` declared them kept. ``direct`` and
    ``direct_note`` say whether direct I/O is used, and why not. ``max_bytes`` bounds the page bytes allocated on disk.
    Memory: one open extent (``extent_bytes``) per layer, 64 MiB of extents in flight, scratch memory of the engine.

    Safety: one thread calls the store. Writer threads see only full extents (see ``WriteBehind``), reader threads only
    the caller's ``out`` and pages whose write has completed, and those never change. A page that is not on disk yet is
    copied from its extent before ``read_*`` returns. ``close`` stops the readers, then the writers, then closes files.
    """

    tier = "nvme"

    def __init__(
        self,
        directory: Path | None,
        shape: StoreShape,
        *,
        engine: str = "threads",
        capacity_pages: int = 0,
        max_bytes: int | None = None,
        direct: Direct = "auto",
        n_threads: int = 8,
        extent_bytes: int = 1 << 20,
        pinned: bool = False,
    ) -> None:
        self.shape = shape
        self._max_bytes = max_bytes
        self._check_cap(capacity_pages * shape.n_layers)
        self._engine = build_engine(engine, n_threads=n_threads)
        try:
            self._folder = StoreDirectory(directory)
            self.direct, self.direct_note = _choose_direct(self._folder.path, direct)
            headers = [Header(layer, shape) for layer in range(shape.n_layers)]
            files = [
                PageFile.create(self._folder.path, header, n_pages=capacity_pages, direct=self.direct)
                for header in headers
            ]
        except StorageError:
            self._abandon()
            raise
        self._start(files, extent_bytes, pinned, checksums=[[] for _ in files])

    @classmethod
    def reopen(
        cls,
        directory: Path,
        *,
        engine: str = "threads",
        max_bytes: int | None = None,
        direct: Direct = "auto",
        n_threads: int = 8,
        extent_bytes: int = 1 << 20,
        pinned: bool = False,
    ) -> "FileStore":
        """A kept store and its pages; ``close`` leaves the folder. IntegrityError when FORMAT.md is violated."""
        manifest, checksums = read_kept(directory)
        store = cls.__new__(cls)
        store.shape = manifest.shape
        store._max_bytes = max_bytes
        store.direct, store.direct_note = _choose_direct(directory, direct)
        files = [
            PageFile.reopen(directory, Header(layer, manifest.shape), n_pages=n_pages, direct=store.direct)
            for layer, n_pages in enumerate(manifest.n_pages)
        ]
        store._folder = StoreDirectory.of_kept(directory)
        store._engine = build_engine(engine, n_threads=n_threads)
        store._start(files, extent_bytes, pinned, checksums=checksums)
        return store

    def _start(self, files: list[PageFile], extent_bytes: int, pinned: bool, *, checksums: list[list[int]]) -> None:
        self._files = files
        self._checksums = checksums
        self._layout = layout_of(self.shape)
        self._closed = False
        self._writes = WriteBehind(files, extent_bytes=extent_bytes, max_in_flight_bytes=IN_FLIGHT_BYTES, pinned=pinned)

    @property
    def directory(self) -> Path:
        """The store's own folder."""
        return self._folder.path

    @property
    def note(self) -> str:
        return "" if self.direct else f"{self._folder.path}: buffered reads and writes: {self.direct_note}"

    @property
    def slice_cost_bytes(self) -> int:
        return self._layout.slice_cost_bytes

    @property
    def allocated_bytes(self) -> int:
        """Page bytes of all layers that the disk has set aside, headers not counted."""
        return sum(file.n_allocated for file in self._files) * self._layout.page_stride

    def n_pages(self, layer: int) -> int:
        return len(self._checksums[layer])

    def append(self, layer: int, pages: Tensor) -> Moved:
        check_pages(self.shape, pages)
        first = self.n_pages(layer)
        self._writes.raise_failure()
        self._make_room(layer, first + len(pages))
        while (n_taken := self.n_pages(layer) - first) < len(pages):
            self._checksums[layer] += self._writes.take(layer, first + n_taken, pages[n_taken:])
        return Moved(nvme=len(pages) * self._layout.page_stride)

    def read_slices(self, layer: int, page_ids: Tensor, slice_ids: Tensor, out: Tensor) -> Ticket:
        check_slice_read(self.shape, self.n_pages(layer), page_ids, slice_ids, out)
        return self._read(layer, page_ids.numpy(), slice_ids.numpy(), out=out, layout=self._layout)

    def read_pages(self, layer: int, first: int, out: Tensor) -> Ticket:
        check_page_read(self.shape, self.n_pages(layer), first, out)
        page_ids = np.arange(first, first + len(out), dtype=np.int64)
        whole = self._layout.whole_pages()
        ticket = self._read(layer, page_ids, np.zeros_like(page_ids), out=out.flatten(1), layout=whole)
        expected = self._checksums[layer][first : first + len(out)]
        return _VerifyingTicket(ticket, self._files[layer].path, first, out, expected)

    def mapped(self, layer: int) -> Tensor | None:
        return None

    def flush(self) -> None:
        self._writes.flush()

    def verify(self) -> int:
        """Read every page and compare its checksum; how many pages there were. IntegrityError names file and page."""
        step = max(1, VERIFY_BYTES // self._layout.page_stride)
        memory = aligned_empty(step * self.shape.page_bytes).view(step, self.shape.n_slices, self.shape.slice_bytes)
        for layer in range(self.shape.n_layers):
            for first in range(0, self.n_pages(layer), step):
                n = min(step, self.n_pages(layer) - first)
                self.read_pages(layer, first, memory[:n]).wait()
        return sum(self.n_pages(layer) for layer in range(self.shape.n_layers))

    def keep(self) -> Path:
        """Flush, sync, write manifest and checksums; from now on ``close`` leaves the folder, which is returned."""
        self.flush()
        sync(self._files)
        write_kept(self._folder.path, self.shape, self._checksums)
        self._folder.keep()
        return self._folder.path

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._engine.close()
        self._writes.close()
        for file in self._files:
            file.close()
        self._folder.remove()

    def _read(
        self, layer: int, page_ids: Int64Array, slice_ids: Int64Array, *, out: Tensor, layout: PageLayout
    ) -> Ticket:
        """Copy what is in memory now, start reading the rest; out uint8 [n, layout.slice_bytes]."""
        self._writes.raise_failure()
        on_disk = np.ones(len(page_ids), dtype=bool)
        n_copied = 0
        for rows, extent in self._writes.memory_of(layer, page_ids):
            source = extent.pages.numpy().reshape(-1, layout.n_slices, layout.slice_bytes)
            out.numpy()[rows] = source[page_ids[rows] - extent.first, slice_ids[rows]]
            on_disk[rows] = False
            n_copied += len(rows) * layout.slice_bytes
        if not on_disk.any():
            return DoneTicket(Moved(cpu=n_copied))
        disk_rows = np.flatnonzero(on_disk)
        plan = plan_read(page_ids[disk_rows], slice_ids[disk_rows], layout)
        file = self._files[layer]
        pending = self._engine.read(file, _jobs(plan, disk_rows, out, direct=self.direct))
        return _FileTicket(pending, plan, disk_rows, out, Moved(cpu=n_copied, nvme=plan.n_bytes))

    def _make_room(self, layer: int, n_pages: int) -> None:
        """Grow the layer's file to ``n_pages`` or, where cap and disk allow, to twice what it has."""
        file = self._files[layer]
        if n_pages <= file.n_allocated:
            return
        others = sum(other.n_allocated for other in self._files) - file.n_allocated
        self._check_cap(others + n_pages)
        wanted = max(n_pages, 2 * file.n_allocated)
        if self._max_bytes is not None:
            wanted = max(n_pages, min(wanted, self._max_bytes // self._layout.page_stride - others))
        try:
            file.allocate(wanted)
        except CapacityError:
            file.allocate(n_pages)

    def _check_cap(self, n_pages: int) -> None:
        """``n_pages`` is what all layers together would have allocated."""
        n_bytes = n_pages * layout_of(self.shape).page_stride
        if self._max_bytes is not None and n_bytes > self._max_bytes:
            raise CapacityError(f"the store would take {n_bytes:,} bytes on disk, the cap is {self._max_bytes:,}")

    def _abandon(self) -> None:
        self._engine.close()
        if hasattr(self, "_folder"):
            self._folder.remove()


class _FileTicket(Ticket):
    """Disk reads under way; rows that repeat another row are copied when those have arrived."""

    def __init__(self, pending: PendingRead, plan: ReadPlan, disk_rows: Int64Array, out: Tensor, moved: Moved) -> None:
        self._pending, self._plan, self._disk_rows, self._out, self._moved = pending, plan, disk_rows, out, moved

    def wait(self) -> Moved:
        self._pending.result()
        if self._plan.repeats:
            rows = self._out.numpy()
            rows[self._disk_rows[list(self._plan.repeats)]] = rows[self._disk_rows[list(self._plan.repeat_of)]]
        return self._moved


class _VerifyingTicket(Ticket):
    """Whole pages under way, compared with their checksums once they are there."""

    def __init__(self, inner: Ticket, path: Path, first: int, out: Tensor, expected: Sequence[int]) -> None:
        self._inner, self._path, self._first, self._out, self._expected = inner, path, first, out, expected

    def wait(self) -> Moved:
        moved = self._inner.wait()
        for i, page in enumerate(self._out.flatten(1).numpy()):
            found = checksum(page.data)
            if found != self._expected[i]:
                raise IntegrityError(
                    f"{self._path}: page {self._first + i} has checksum {found:016x}, expected {self._expected[i]:016x}"
                )
        return moved


def _jobs(plan: ReadPlan, disk_rows: Int64Array, out: Tensor, *, direct: bool) -> list[ReadJob]:
    """The plan's ranges with the rows of ``out`` that they fill."""
    rows = [*out.numpy()]
    where = disk_rows.tolist()
    whole_blocks = out.shape[1] % BLOCK_BYTES == 0
    in_place = whole_blocks and (is_aligned(out) or not direct)
    return [
        ReadJob(r.offset, r.n_bytes, tuple([rows[where[row]] for row in r.rows]), r.starts, in_place)
        for r in plan.ranges
    ]


def _choose_direct(directory: Path, direct: Direct) -> tuple[bool, str]:
    if direct == "off":
        return False, "direct I/O was turned off"
    works, note = probe_direct(directory)
    if direct == "on" and not works:
        raise UnavailableError(f"{directory}: {note}")
    return works, note
