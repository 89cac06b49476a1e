"""Pages in files: tier "nvme", direct I/O where the disk takes it, write-behind, checksums per slice."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .aligned import aligned_empty
from .bundle_format import new_name
from .checks import check_page_read, check_pages, check_slice_read
from .directory import StoreDirectory
from .disk import probe_direct
from .engines import build_engine
from .errors import CapacityError, StorageError, UnavailableError
from .file_reads import FileTicket, PartRead, VerifyingTicket, all_slices, batch_of, check_slices, put_rows
from .format import Header, PageLayout, layout_of
from .page_file import PageFile
from .plan import Int64Array, plan_read
from .segments import Sealed, Segment
from .space import Room
from .store import Moved, Store, StoreShape, Ticket
from .tickets import DoneTicket
from .write_behind import WriteBehind, sync

Direct = Literal["auto", "on", "off"]
IN_FLIGHT_BYTES = 64 << 20
VERIFY_BYTES = 8 << 20


class FileStore(Store):
    """One file per layer in a folder of its own, format as in FORMAT.md, behind the pages of ``begin``, which lie in
    other folders and are only read.

    The folder is new, inside ``directory`` (None: the system's for temporary files), and removed by ``close``, when the
    store is dropped and at interpreter exit; a session keeps links to its files. ``direct`` and ``direct_note`` say
    whether direct I/O is used, and why not. ``max_bytes`` bounds what all stores and sessions in ``directory`` take
    (None: what this store takes), ``floor_bytes`` what stays free on the disk; sessions that may go are deleted before
    either fails, ``evicted`` has their names. With ``verify`` every slice read is compared with its checksum.
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
        floor_bytes: int = 0,
        direct: Direct = "auto",
        n_threads: int = 8,
        extent_bytes: int = 1 << 20,
        pinned: bool = False,
        verify: bool = False,
        begin: Sealed | None = None,
    ) -> None:
        self.shape = shape
        self._layout = layout_of(shape)
        self.evicted: list[str] = []
        self._verify = verify
        self._closed = False
        self._base = begin.segments if begin is not None else ()
        self._checksums = (
            [list(x) for x in begin.checksums] if begin is not None else [[] for _ in range(shape.n_layers)]
        )
        self._n_base = [len(layer) for layer in self._checksums]
        self._files: list[PageFile] = []
        self._engine = build_engine(engine, n_threads=n_threads, directory=directory)
        try:
            self._folder = StoreDirectory(directory)
            self.direct, self.direct_note = _choose_direct(self._folder.path, direct)
            alone = self._folder.path.name if directory is None else None
            self._room = Room(self._folder.path.parent, max_bytes, floor_bytes, alone)
            with self._room.taking(shape.n_layers * self._layout.page_offset(capacity_pages)) as evicted:
                self.evicted += evicted
                self._files = [self._create(layer, capacity_pages) for layer in range(shape.n_layers)]
        except StorageError:
            self._abandon()
            raise
        self._parts = [self._parts_of(layer) for layer in range(shape.n_layers)]
        self._name = new_name("pages")
        self._writes = WriteBehind(
            self._files, extent_bytes=extent_bytes, max_in_flight_bytes=IN_FLIGHT_BYTES, pinned=pinned
        )

    def _create(self, layer: int, n_pages: int) -> PageFile:
        return PageFile.create(self._folder.path, Header(layer, self.shape), n_pages=n_pages, direct=self.direct)

    def _parts_of(self, layer: int) -> list[tuple[int, PageFile]]:
        """First page and file of every part of the layer, newest last."""
        parts, first = [], 0
        for segment in self._base:
            if segment.n_pages[layer]:
                parts.append((first, segment.files[layer]))
            first += segment.n_pages[layer]
        return [*parts, (first, self._files[layer])]

    @property
    def directory(self) -> Path:
        """The store's own folder."""
        return self._folder.path

    @property
    def engine(self) -> str:
        """Which engine reads."""
        return self._engine.name

    @property
    def reads_to_device(self) -> bool:
        return self._engine.on_device

    @property
    def depth(self) -> int:
        """How many reads are under way at once, at most."""
        return self._engine.depth

    @property
    def note(self) -> str:
        notes = [] if self.direct else [f"{self._folder.path}: buffered reads and writes: {self.direct_note}"]
        if self.evicted:
            notes.append(f"deleted to make room, as they were not pinned: {', '.join(self.evicted)}")
        return "; ".join(notes)

    @property
    def slice_cost_bytes(self) -> int:
        return self._layout.slice_cost_bytes

    @property
    def allocated_bytes(self) -> int:
        """Page bytes of all layers that the disk has set aside for this store, headers not counted."""
        return sum(file.n_allocated for file in self._files) * self._layout.page_stride

    def n_pages(self, layer: int) -> int:
        return len(self._checksums[layer])

    def append(self, layer: int, pages: Tensor) -> Moved:
        check_pages(self.shape, pages)
        first = self.n_pages(layer)
        self._writes.raise_failure()
        self._make_room(layer, first + len(pages) - self._n_base[layer])
        while (n_taken := self.n_pages(layer) - first) < len(pages):
            own = first + n_taken - self._n_base[layer]
            self._checksums[layer] += self._writes.take(layer, own, pages[n_taken:])
        return Moved(nvme=len(pages) * self._layout.page_stride)

    def read_slices(self, layer: int, page_ids: Tensor, slice_ids: Tensor, out: Tensor) -> Ticket:
        check_slice_read(self.shape, self.n_pages(layer), page_ids, slice_ids, out)
        ids = page_ids.numpy(), slice_ids.numpy()
        ticket = self._read(layer, *ids, out=out, layout=self._layout)
        return self._checked(ticket, layer, *ids, out) if self._verify else ticket

    def read_scattered(self, layer: int, page_ids: Tensor, slice_ids: Tensor, memory: Tensor, places: Tensor) -> Ticket:
        ids = page_ids.numpy(), slice_ids.numpy()
        ticket = self._read(layer, *ids, out=memory, layout=self._layout, places=places.numpy())
        if not self._verify:
            return ticket
        return VerifyingTicket(ticket, lambda: self._check(layer, *ids, memory[places]))

    def read_pages(self, layer: int, first: int, out: Tensor) -> Ticket:
        check_page_read(self.shape, self.n_pages(layer), first, out)
        page_ids = np.arange(first, first + len(out), dtype=np.int64)
        whole = self._layout.whole_pages()
        ticket = self._read(layer, page_ids, np.zeros_like(page_ids), out=out.flatten(1), layout=whole)
        return self._checked(ticket, layer, *all_slices(first, len(out), self.shape.n_slices), out.flatten(0, 1))

    def mapped(self, layer: int) -> Tensor | None:
        return None

    def flush(self) -> None:
        self._writes.flush()

    def verify(self) -> int:
        """Read every page and compare its checksums; how many pages there were. IntegrityError names layer and page."""
        step = max(1, VERIFY_BYTES // self._layout.page_stride)
        memory = aligned_empty(step * self.shape.page_bytes).view(step, self.shape.n_slices, self.shape.slice_bytes)
        for layer in range(self.shape.n_layers):
            for first in range(0, self.n_pages(layer), step):
                n = min(step, self.n_pages(layer) - first)
                self.read_pages(layer, first, memory[:n]).wait()
        return sum(self.n_pages(layer) for layer in range(self.shape.n_layers))

    def seal(self) -> Sealed:
        if self._closed:
            raise UnavailableError(f"{self._files[0].path.parent}: the store is closed")
        self.flush()
        sync(self._files)
        own = tuple(self.n_pages(layer) - n for layer, n in enumerate(self._n_base))
        for file, n_pages in zip(self._files, own, strict=True):
            file.trim(n_pages)
        mine = (Segment(self._name, tuple(self._files), own),) if any(own) else ()
        return Sealed(self.shape, (*self._base, *mine), [list(layer) for layer in self._checksums])

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._engine.close()
        self._writes.close()
        for _, file in [part for parts in self._parts for part in parts]:
            file.close()
        self._folder.remove()

    def _checked(
        self, ticket: Ticket, layer: int, page_ids: Int64Array, slice_ids: Int64Array, slices: Tensor
    ) -> Ticket:
        return VerifyingTicket(ticket, lambda: self._check(layer, page_ids, slice_ids, slices))

    def _check(self, layer: int, page_ids: Int64Array, slice_ids: Int64Array, slices: Tensor) -> None:
        expected = self._checksums[layer]
        check_slices(slices, page_ids, slice_ids, expected, directory=self.directory, layer=layer)

    def _read(
        self,
        layer: int,
        page_ids: Int64Array,
        slice_ids: Int64Array,
        *,
        out: Tensor,
        layout: PageLayout,
        places: Int64Array | None = None,
    ) -> Ticket:
        """Copy what is in memory now, start reading the rest; slice i goes to row places[i] (None: i) of out uint8 [n,
        layout.slice_bytes]."""
        self._writes.raise_failure()
        where = np.arange(len(page_ids)) if places is None else places
        on_disk = np.ones(len(page_ids), dtype=bool)
        n_base, n_copied = self._n_base[layer], 0
        for rows, extent in self._writes.memory_of(layer, page_ids - n_base):
            source = extent.pages.numpy().reshape(-1, layout.n_slices, layout.slice_bytes)
            found = source[page_ids[rows] - n_base - extent.first, slice_ids[rows]]
            put_rows(out, where[rows], torch.from_numpy(found))
            on_disk[rows] = False
            n_copied += len(rows) * layout.slice_bytes
        if not on_disk.any():
            return DoneTicket(Moved(cpu=n_copied))
        parts, left = [], np.flatnonzero(on_disk)
        for first, file in reversed(self._parts[layer]):
            inside = page_ids[left] >= first
            here, left = left[inside], left[~inside]
            if len(here):
                plan = plan_read(page_ids[here] - first, slice_ids[here], layout)
                pending = self._engine.read(file, batch_of(plan, where[here], out, direct=file.direct))
                parts.append(PartRead(pending, plan, where[here], layer, first))
        return FileTicket(parts, out, Moved(cpu=n_copied))

    def _make_room(self, layer: int, n_pages: int) -> None:
        """Grow the layer's own file to ``n_pages`` or, where all layers could do so, to twice what it has."""
        file = self._files[layer]
        if n_pages <= file.n_allocated:
            return
        stride, wanted = self._layout.page_stride, max(n_pages, 2 * file.n_allocated)
        with self._room.taking((n_pages - file.n_allocated) * stride) as evicted:
            self.evicted += evicted
            if not self._room.fits((wanted - file.n_allocated) * stride * self.shape.n_layers):
                wanted = n_pages
            try:
                file.allocate(wanted)
            except CapacityError:
                self._allocate_tightly(file, n_pages)

    def _allocate_tightly(self, file: PageFile, n_pages: int) -> None:
        while True:
            try:
                return file.allocate(n_pages)
            except CapacityError:
                name = self._room.evict()
                if name is None:
                    raise
                self.evicted.append(name)

    def _abandon(self) -> None:
        self._engine.close()
        if hasattr(self, "_folder"):
            self._folder.remove()


def _choose_direct(directory: Path, direct: Direct) -> tuple[bool, str]:
    if direct == "off":
        return False, "direct I/O was turned off"
    works, note = probe_direct(directory)
    if direct == "on" and not works:
        raise UnavailableError(f"{directory}: {note}")
    return works, note
