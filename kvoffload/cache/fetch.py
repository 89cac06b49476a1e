"""Fetching selected slices from a store to the device, and streaming whole pages through it."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from kvoffload_kernels.cache_slots.reference import Hits
from kvoffload_kernels.dispatch import gather_slices, reads_in_place
from kvoffload_storage.aligned import aligned_empty
from kvoffload_storage.errors import StorageError
from kvoffload_storage.store import Moved, Store, Ticket
from torch import Tensor

from kvoffload.cache.arrived import Arrival, Arrived, Traffic
from kvoffload.cache.packed import unpack_slices
from kvoffload.cache.slots import Slots
from kvoffload.geometry import Geometry
from kvoffload.repeats import on_host
from kvoffload.values import Pages, Selection


class Fetch(ABC):
    """Moves pages of one layer from the store to the device, and counts what really moved."""

    def __init__(self, store: Store, layer: int, slots: Slots, geometry: Geometry) -> None:
        self.store, self.layer, self.slots, self.geometry = store, layer, slots, geometry
        self.device = slots.data.device
        self.decode, self.prefill, self.refresh = (Traffic(spared=self._count()) for _ in range(3))
        self.n_asked, self.n_hits = 0, self._count()
        self.wait_s = 0.0  # that decode steps were blocked by reads
        self.n_late = 0  # slices of decode steps that were not waited for
        self.patience_s: float | None = None  # how long a step waits for its slices; None: until they are there
        self.step_bytes = 0  # device bytes of the largest step so far that no cache keeps; layers share them

    asks_host: bool = False
    """Whether ``move`` has work for the host, which can fail."""

    @property
    def can_hold(self) -> bool:
        """Whether ``note`` and ``move``, which make a ``start`` together, bring all that is asked for."""
        return True

    @abstractmethod
    def note(self, n_slices: int) -> None:
        """Count slices that ``move`` was asked for, as far as it does not itself."""

    @abstractmethod
    def move(self, selection: Selection, *, early: bool = False, in_place: bool = False) -> list[Arrival]:
        """The same work on the device for every selection of its length; what the host has to do is ``on_host``.
        ``early`` says that other work comes before the slices are needed, ``in_place`` that attention reads them, once,
        and nothing else does: then they may stay where they are."""

    @abstractmethod
    def start(self, selection: Selection) -> list[Arrival]:
        """Ask for the slices without waiting for slow bytes; those already on the device come first. Slices that are
        late (``patience_s``) are left out, unless the selection is all there is.

        The tensors are valid until the next request.
        """

    def _count(self) -> Tensor:
        """A count where selections are looked up."""
        return torch.zeros((), dtype=torch.int64)

    @property
    def _spared_bytes(self) -> int:
        """What a slice has too much in ``moved`` if the page cache has it."""
        return 0

    @abstractmethod
    def stream(self, block: int, traffic: Traffic | None = None) -> Iterator[Pages]:
        """All sealed pages in order, ``block`` at a time; counted as prefill traffic where none is given. ``valid`` is
        None: the caller knows the padding. Each block is valid until the next is asked for."""

    @abstractmethod
    def ask_pages(self, first: int, n_pages: int, traffic: Traffic) -> Callable[[], Pages]:
        """Ask for a run of sealed pages without waiting; the call gives them, ``valid`` None, until the next run is
        asked for. Steps may come in between."""

    def ahead(self, selection: Selection) -> None:
        """Slices that the next step of this layer will probably select: a tier may begin to move them."""
        selection = selection.to(torch.device("cpu"))
        self.store.ahead(self.layer, selection.page_ids, selection.store_rows)

    def take_counts(self, other: "Fetch") -> None:
        """Go on with what another one has counted, in whose place this one comes."""
        other.count_unasked()
        self.decode, self.prefill, self.refresh = other.decode, other.prefill, other.refresh
        self.n_asked, self.n_hits, self.n_late = other.n_asked, other.n_hits, other.n_late
        self.wait_s, self.step_bytes = other.wait_s, other.step_bytes

    def count_unasked(self) -> None:
        """Count what moved as decode traffic that no step had to wait for."""
        self.decode.moved += self.store.moved_unasked(self.layer)

    @contextmanager
    def counted_as_prefill(self) -> Iterator[None]:
        """Requests inside this block are part of the prefill: their bytes and hits leave the decode's counts alone."""
        decode, asked, hits = self.decode, self.n_asked, self.n_hits.clone()
        wait_s, late, patience_s = self.wait_s, self.n_late, self.patience_s
        self.decode, self.patience_s = self.prefill, None
        try:
            yield
        finally:
            self.decode, self.n_asked = decode, asked
            self.n_hits.copy_(hits)
            self.wait_s, self.n_late, self.patience_s = wait_s, late, patience_s

    def _ids(self, selection: Selection) -> Tensor:
        """A number for each slice, its place among all of the layer, int64 [F]."""
        return torch.add(selection.store_rows, selection.page_ids, alpha=self.geometry.rows)

    def _admit(self, selection: Selection, ids: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Places in the page cache; several queries of a row, which may want the same pages, pass it by."""
        if selection.n_queries > 1:
            return None
        keys = ids if selection.wanted is None else torch.where(selection.wanted, ids, -1)
        return self.slots.admit(keys, self._n_ids(), Hits(self.n_hits, self.decode.spared, self._spared_bytes))

    def _n_ids(self) -> int:
        """How many ``_ids`` there may be, which does not change while steps have fixed shapes."""
        return self.store.n_pages(self.layer) * self.geometry.rows

    def _pages(self, data: Tensor) -> Pages:
        keys, values = unpack_slices(data, self.geometry)
        return Pages(keys.transpose(0, 1), values.transpose(0, 1), None)


class MappedFetch(Fetch):
    """For tiers that the device can address: a gather by device-side ids; nothing in a step waits for the host."""

    def start(self, selection: Selection) -> list[Arrival]:
        self.note(len(selection))
        return self.move(selection)

    def note(self, n_slices: int) -> None:
        self.n_asked += n_slices
        if self.store.tier != "gpu":
            self.decode.moved += Moved(cpu=n_slices * self.geometry.slice_bytes)

    def move(self, selection: Selection, *, early: bool = False, in_place: bool = False) -> list[Arrival]:
        selection = selection.to(self.device)
        ids, source = self._ids(selection), self._memory().flatten(0, 1)
        admitted = self._admit(selection, ids)
        if admitted is None:
            if in_place and self._stays(ids, source, by_row=selection.by_row):
                return [lambda: Arrived(selection, source, ids)]
            places = self.slots.reserve(len(selection))
            self.step_bytes = max(self.step_bytes, places.numel())
            gather_slices(source, ids, places, None, selection.wanted)
            return [lambda: Arrived(selection, places)]
        slot_ids, _, missed = admitted
        gather_slices(source, ids, self.slots.data, slot_ids, missed)
        return [lambda: Arrived(selection, self.slots.data, slot_ids)]

    def _stays(self, ids: Tensor, source: Tensor, *, by_row: bool) -> bool:
        slices = unpack_slices(source, self.geometry)
        return reads_in_place(ids, self.geometry.group_size, *slices, by_row=by_row)

    def stream(self, block: int, traffic: Traffic | None = None) -> Iterator[Pages]:
        n_pages = self.store.n_pages(self.layer)
        for first in range(0, n_pages, block):
            yield self.ask_pages(first, min(block, n_pages - first), traffic or self.prefill)()

    def ask_pages(self, first: int, n_pages: int, traffic: Traffic) -> Callable[[], Pages]:
        def arrive() -> Pages:
            data = self._memory()[first : first + n_pages]  # not before: an append may move the memory
            if self.store.tier != "gpu":
                traffic.moved += Moved(cpu=data.numel())
            return self._pages(data.to(self.device, non_blocking=True))

        return arrive

    def _count(self) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def _spared_bytes(self) -> int:
        return 0 if self.store.tier == "gpu" else self.geometry.slice_bytes

    def _n_ids(self) -> int:
        return len(self._memory()) * self.geometry.rows

    def _memory(self) -> Tensor:
        memory = self.store.mapped(self.layer)
        assert memory is not None, "MappedFetch needs an addressable store"
        return memory


class SubmittedFetch(Fetch):
    """For tiers behind the host: the host learns the selection and submits the reads; hits are used while misses
    travel.

    The requests of one ``start`` (one for each of a row's queries) are under way together, each in its part of the
    staging buffer, which is free again when the next ones start; copies out of it are ordered by the device's stream,
    which ``wait`` on the following request's ids has synchronised.
    """

    asks_host = True

    def __init__(self, store: Store, layer: int, slots: Slots, geometry: Geometry) -> None:
        super().__init__(store, layer, slots, geometry)
        self._staging, self._run = aligned_empty(0), aligned_empty(0)

    def start(self, selection: Selection) -> list[Arrival]:
        return [arrive for _, arrive in self._ask(selection.to(torch.device("cpu")))]

    @property
    def can_hold(self) -> bool:
        return self.patience_s is None

    def note(self, n_slices: int) -> None:
        """``move`` counts what it asks for."""

    def move(self, selection: Selection, *, early: bool = False, in_place: bool = False) -> list[Arrival]:
        places = self.slots.reserve(len(selection))
        if not early:
            on_host(lambda: self._bring(selection, places)())
            return [lambda: Arrived(selection, places)]
        under_way: list[Callable[[], None]] = [lambda: None]

        def ask() -> None:
            under_way[0] = self._bring(selection, places)

        def arrive() -> Arrived:
            on_host(lambda: under_way[0]())
            return Arrived(selection, places)

        on_host(ask)

        return [arrive]

    def _bring(self, selection: Selection, out: Tensor) -> Callable[[], None]:
        """Ask for the wanted slices of a selection on the device; the call waits for them and brings each to its row of
        uint8 [F, slice_bytes] there."""
        selection = selection.to(torch.device("cpu"))
        rows = torch.arange(len(selection)) if selection.wanted is None else selection.wanted.nonzero()[:, 0]
        asked = self._ask(Selection(selection.row_ids[rows], selection.page_ids[rows]))

        def bring() -> None:
            for part, arrive in asked:
                data = arrive().data
                if len(data) == len(out):
                    out.copy_(data)
                else:
                    out.index_copy_(0, rows[part].to(self.device), data)

        return bring

    def _ask(self, selection: Selection) -> list[tuple[Tensor | slice, Arrival]]:
        """Requests for slices, ids in host memory, and which of them each one brings if each row has one query."""
        self.n_asked += len(selection)
        admitted = self._admit(selection, self._ids(selection))
        if admitted is None:
            return [(slice(None), arrive) for arrive in self._submit(selection.by_query())]
        places, hit, _ = admitted
        have = Selection(selection.row_ids[hit], selection.page_ids[hit])
        want = Selection(selection.row_ids[~hit], selection.page_ids[~hit])
        resident = self.slots.data.index_select(0, places[hit].to(self.device))
        (missing,) = self._submit([want], places[~hit].to(self.device))
        return [(hit, lambda: Arrived(have, resident)), (~hit, missing)]

    def stream(self, block: int, traffic: Traffic | None = None) -> Iterator[Pages]:
        n_pages = self.store.n_pages(self.layer)
        starts = range(0, n_pages, block)
        runs = [self._buffer(min(block, n_pages) * self.store.shape.page_bytes) for _ in starts[:2]]

        def ask(i: int) -> Callable[[], Tensor]:
            return self._read_pages(starts[i], min(block, n_pages - starts[i]), runs[i % 2], traffic or self.prefill)

        ahead = [ask(0)] if n_pages else []
        for i in range(len(starts)):
            data = ahead.pop()()
            ahead = [ask(i + 1)] if i + 1 < len(starts) else []
            yield self._pages(data.to(self.device))

    def ask_pages(self, first: int, n_pages: int, traffic: Traffic) -> Callable[[], Pages]:
        n_bytes = n_pages * self.store.shape.page_bytes
        if n_bytes > self._run.numel():
            self._run = self._buffer(n_bytes)
        data = self._read_pages(first, n_pages, self._run, traffic)
        return lambda: self._pages(data().to(self.device))

    def _read_pages(self, first: int, n_pages: int, buffer: Tensor, traffic: Traffic) -> Callable[[], Tensor]:
        """Start reading into the buffer; the call gives the pages in host memory."""
        shape = self.store.shape
        out = buffer[: n_pages * shape.page_bytes].view(n_pages, shape.n_slices, shape.slice_bytes)
        ticket = self.store.read_pages(self.layer, first, out)

        def arrive() -> Tensor:
            traffic.moved += ticket.wait()
            return out

        return arrive

    def _submit(self, selections: list[Selection], places: Tensor | None = None) -> list[Arrival]:
        """One read for each selection, so that each moves what it would alone."""
        n_slices, size = sum(map(len, selections)), self.geometry.slice_bytes
        if n_slices * size > self._staging.numel():
            on_device = self.store.reads_to_device and self.device.type == "cuda"
            self._staging = self.slots.data.new_empty(n_slices * size) if on_device else self._buffer(n_slices * size)
        self.step_bytes = max(self.step_bytes, n_slices * size)
        parts = self._staging[: n_slices * size].view(n_slices, size).split([len(s) for s in selections])
        return [self._read(s, part, places) for s, part in zip(selections, parts, strict=True)]

    def _read(self, selection: Selection, staged: Tensor, places: Tensor | None) -> Arrival:
        self.count_unasked()
        ticket = self.store.read_slices(self.layer, selection.page_ids, selection.store_rows, staged)

        def arrive() -> Arrived:
            landed = self._wait(ticket, len(selection))
            if landed is not None:
                self.n_late += len(selection) - len(landed)
                late = Selection(selection.row_ids[landed], selection.page_ids[landed], selection.n_queries)
                return Arrived(late.to(self.device), staged[landed].to(self.device))
            data = staged.to(self.device)
            if places is not None:
                self.slots.data.index_copy_(0, places, data)
            return Arrived(selection.to(self.device), data)

        return arrive

    def _wait(self, ticket: Ticket, n_slices: int) -> Tensor | None:
        """Wait for a step's slices; int64 rows of those that came where some are late."""
        everything = n_slices >= self.store.n_pages(self.layer) * self.geometry.rows
        patience_s = None if everything else self.patience_s
        started = time.perf_counter()
        ticket.done(patience_s)
        self.wait_s += time.perf_counter() - started  # blocked; what follows is work on bytes that are there
        try:
            if patience_s is None:
                self.decode.moved += ticket.wait()
                return None
            moved, landed = ticket.settle(0.0)
            self.decode.moved += moved
            return None if landed is None else torch.from_numpy(landed.nonzero()[0])
        except StorageError:
            self.slots.forget()
            raise

    def _buffer(self, n_bytes: int) -> Tensor:
        return aligned_empty(n_bytes, pinned=self.device.type == "cuda")
