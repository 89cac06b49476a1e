"""Slices in host memory before a slower store: tier "nvme" with a bounded cpu tier in front, least recently used."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .aligned import aligned_empty
from .checks import check_slice_read
from .errors import StorageError
from .plan import Int64Array
from .segments import Sealed
from .store import Moved, Store, Ticket
from .wrappers import WrapperStore

_NONE = -1


@dataclass(eq=False)
class Flight:
    """Slices on their way into slots; ``owned`` while somebody holds its ticket and will tell what it moved."""

    layer: int
    slots: Int64Array
    ticket: Ticket
    owned: bool


@dataclass(eq=False)
class Beside:
    """Slices on their way past the slots: row i of ``buffer`` is for row ``rows[i]`` of who asked."""

    layer: int
    rows: Int64Array
    buffer: Tensor
    ticket: Ticket


class TieredStore(WrapperStore):
    """All pages are in ``inner``; what is read from it passes through slots in host memory and stays in them until they
    are needed for something used more recently. ``max_bytes`` bounds the slots of all layers together.

    Reads of whole pages pass the slots by: they are long runs, each page once. New pages go to free slots. A read whose
    slices do not all fit reads the others straight into the caller's buffer. ``n_parts`` is how finely a read can be
    late (``Ticket.settle``).

    Safety: one thread calls the store. The inner store's threads write into slots only; a slot with a read under way
    (``_busy``) or that a ticket will still copy from (``_held``) is given to nobody. When a read fails, its slots have
    no owner any more: whoever wanted to copy from them reads again, past the slots, and is told what that fails with.
    """

    def __init__(self, inner: Store, *, max_bytes: int, pinned: bool = False, n_parts: int = 1) -> None:
        super().__init__(inner)
        n_slots = max_bytes // self.shape.slice_bytes
        self.memory = aligned_empty(n_slots * self.shape.slice_bytes, pinned=pinned).view(-1, self.shape.slice_bytes)
        self._slot_of = [np.full(0, _NONE, np.int64) for _ in range(self.shape.n_layers)]
        self._owner = np.full((n_slots, 2), _NONE, np.int64)  # layer and key of the slice in each slot
        self._used = np.zeros(n_slots, np.int64)
        self._busy = np.zeros(n_slots, bool)
        self._held = np.zeros(n_slots, np.int64)
        self._now, self._n_parts = 0, n_parts
        self._flights: list[Flight] = []
        self._left: list[Beside] = []
        self._unasked = [Moved() for _ in range(self.shape.n_layers)]

    @property
    def reads_to_device(self) -> bool:
        return False  # the slots are in host memory

    @property
    def n_slots(self) -> int:
        return len(self._used)

    def append(self, layer: int, pages: Tensor) -> Moved:
        first = self.inner.n_pages(layer)
        try:
            return self.inner.append(layer, pages)
        finally:
            n_taken = self.inner.n_pages(layer) - first
            self._keep_new(layer, first, pages[:n_taken])

    def read_slices(self, layer: int, page_ids: Tensor, slice_ids: Tensor, out: Tensor) -> Ticket:
        check_slice_read(self.shape, self.n_pages(layer), page_ids, slice_ids, out)
        keys = page_ids.numpy() * self.shape.n_slices + slice_ids.numpy()
        flights = self._bring(layer, keys, owned=True)
        slots = self._slots(layer)[keys]
        past = np.flatnonzero(slots == _NONE)
        beside = self._read_beside(layer, past, keys[past]) if len(past) else None
        rows = np.flatnonzero(slots != _NONE)
        np.add.at(self._held, slots[rows], 1)
        return _TieredTicket(self, layer, out, rows, keys[rows], slots[rows], flights, beside)

    def ahead(self, layer: int, page_ids: Tensor, slice_ids: Tensor) -> None:
        try:
            self._bring(layer, page_ids.numpy() * self.shape.n_slices + slice_ids.numpy(), owned=False)
        except StorageError:  # told again, and raised, when somebody waits for these slices
            return

    def moved_unasked(self, layer: int) -> Moved:
        self._reap()
        moved, self._unasked[layer] = self._unasked[layer], Moved()
        return moved

    def seal(self) -> Sealed | None:
        return self.inner.seal()

    def close(self) -> None:
        for ticket in [*(flight.ticket for flight in self._flights), *(beside.ticket for beside in self._left)]:
            ticket.done(None)
        self._flights, self._left = [], []
        self.inner.close()

    def _read_beside(self, layer: int, rows: Int64Array, keys: Int64Array) -> "Beside":
        """Read slices for which there are no slots into memory of their own, which may be late like the others."""
        buffer = aligned_empty(len(keys) * self.shape.slice_bytes).view(-1, self.shape.slice_bytes)
        pages, pieces = (torch.from_numpy(ids) for ids in np.divmod(keys, self.shape.n_slices))
        return Beside(layer, rows, buffer, self.inner.read_slices(layer, pages, pieces, buffer))

    def leave(self, beside: "Beside") -> None:
        """Nobody waits for these slices any more; their memory lives until they have come."""
        self._left.append(beside)

    def land(self, flight: Flight) -> Moved:
        """Wait for a flight and open its slots; what it moved. Raises what it failed with: then its slots are free."""
        self._flights.remove(flight)
        self._busy[flight.slots] = False
        try:
            return flight.ticket.wait()
        except StorageError:
            self._free(flight.slots)
            raise

    def release(self, slots: Int64Array) -> None:
        """A ticket will not copy from these slots any more."""
        np.subtract.at(self._held, slots, 1)

    def is_busy(self, slots: Int64Array) -> NDArray[np.bool_]:
        """Whose slice is still on its way, bool [n]."""
        return self._busy[slots]

    def is_lost(self, slots: Int64Array) -> NDArray[np.bool_]:
        """Which of the held slots have no slice because their read failed, bool [n]."""
        return np.asarray(self._owner[slots, 0] == _NONE)

    def flights_to(self, slots: Int64Array) -> list[Flight]:
        """Flights that these slots wait for."""
        return [flight for flight in self._flights if np.isin(slots, flight.slots).any()]

    def _bring(self, layer: int, keys: Int64Array, *, owned: bool) -> list[Flight]:
        """Mark slices as used and start reading those that are in no slot, as far as there are slots."""
        self._reap()
        self._now += 1
        table = self._slots(layer)
        present = table[keys]
        self._used[present[present != _NONE]] = self._now
        missing = np.unique(keys[present == _NONE])
        slots = self._take_slots(len(missing))
        missing = missing[: len(slots)]
        if not len(missing):
            return []
        n_parts = self._n_parts if owned else 1
        parts = zip(np.array_split(missing, n_parts), np.array_split(slots, n_parts), strict=True)
        return [self._start(layer, part, places, owned) for part, places in parts if len(part)]

    def _start(self, layer: int, keys: Int64Array, slots: Int64Array, owned: bool) -> Flight:
        pages, pieces = torch.from_numpy(keys // self.shape.n_slices), torch.from_numpy(keys % self.shape.n_slices)
        ticket = self.inner.read_scattered(layer, pages, pieces, self.memory, torch.from_numpy(slots))
        self._give(layer, keys, slots)
        self._busy[slots] = True
        self._flights.append(Flight(layer, slots, ticket, owned))
        return self._flights[-1]

    def _take_slots(self, n: int) -> Int64Array:
        """Up to ``n`` slots that nobody needs, the longest unused first; what was in them is forgotten."""
        free = np.flatnonzero(~self._busy & (self._held == 0) & (self._used < self._now))
        if n < len(free):
            free = free[np.argpartition(self._used[free], n)[:n]]
        slots = free[:n]
        self._free(slots)
        return slots

    def _free(self, slots: Int64Array) -> None:
        for layer, key in self._owner[slots].tolist():
            if layer != _NONE:
                self._slot_of[layer][key] = _NONE
        self._owner[slots] = _NONE
        self._used[slots] = 0

    def _give(self, layer: int, keys: Int64Array, slots: Int64Array) -> None:
        self._slots(layer)[keys] = slots
        self._owner[slots, 0], self._owner[slots, 1] = layer, keys
        self._used[slots] = self._now

    def _keep_new(self, layer: int, first: int, pages: Tensor) -> None:
        n_slices = self.shape.n_slices
        free = np.flatnonzero(self._owner[:, 0] == _NONE)
        free = free[~self._busy[free] & (self._held[free] == 0)]
        n_kept = min(len(free) // n_slices, len(pages))
        if n_kept == 0:
            return
        slots = free[: n_kept * n_slices]
        self.memory.numpy()[slots] = pages[:n_kept].cpu().reshape(-1, self.shape.slice_bytes).numpy()
        self._give(layer, np.arange(first * n_slices, (first + n_kept) * n_slices), slots)

    def _slots(self, layer: int) -> Int64Array:
        """Slot of every slice of a layer, or _NONE."""
        table, n = self._slot_of[layer], self.inner.n_pages(layer) * self.shape.n_slices
        if n > len(table):
            more = np.full(max(n, 2 * len(table)) - len(table), _NONE, np.int64)
            table = self._slot_of[layer] = np.concatenate([table, more])
        return table

    def _reap(self) -> None:
        """Land the flights that nobody waits for and that are over."""
        for flight in [f for f in self._flights if not f.owned and f.ticket.done(0.0)]:
            try:
                self._unasked[flight.layer] += self.land(flight)
            except StorageError:  # its slots are free: whoever needs the slices reads them again, and is told
                continue
        for beside in [b for b in self._left if b.ticket.done(0.0)]:
            self._left.remove(beside)
            try:
                self._unasked[beside.layer] += beside.ticket.wait()
            except StorageError:  # nobody wanted them any more
                continue


class _TieredTicket(Ticket):
    """Rows that come from slots, after the flights to them have landed, and rows that are read straight into place."""

    def __init__(
        self, store: TieredStore, layer: int, out: Tensor, rows: Int64Array, keys: Int64Array, slots: Int64Array,
        mine: list[Flight], beside: Beside | None,
    ) -> None:  # fmt: skip
        self._store, self._layer, self._out = store, layer, out
        self._rows, self._keys, self._slots = rows, keys, slots
        self._mine, self._beside = mine, beside

    def done(self, timeout_s: float | None) -> bool:
        tickets = [flight.ticket for flight in self._store.flights_to(self._slots)]
        tickets += [] if self._beside is None else [self._beside.ticket]
        if timeout_s is None:
            return all(ticket.done(None) for ticket in tickets)
        end = time.monotonic() + timeout_s
        return all(ticket.done(max(0.0, end - time.monotonic())) for ticket in tickets)

    def wait(self) -> Moved:
        return self._collect(None)[0]

    def settle(self, timeout_s: float) -> "tuple[Moved, NDArray[np.bool_] | None]":
        moved, landed = self._collect(timeout_s)
        return moved, None if landed.all() else landed

    def _collect(self, timeout_s: float | None) -> tuple[Moved, NDArray[np.bool_]]:
        landed, moved = np.ones(len(self._out), bool), Moved()
        try:
            for flight in self._due(timeout_s):
                moved += self._land(flight)
            landed[self._rows[self._store.is_busy(self._slots)]] = False
            moved += self._copy()
            return moved + self._take_beside(landed, timeout_s), landed
        finally:
            self._store.release(self._slots)
            for flight in self._mine:  # late ones land by themselves, and tell then what they moved
                flight.owned = False

    def _due(self, timeout_s: float | None) -> list[Flight]:
        """The flights to wait for: all of them, or those that are over in time."""
        flights = self._store.flights_to(self._slots)
        if timeout_s is None:
            return flights
        end = time.monotonic() + timeout_s
        return [f for f in flights if f.ticket.done(max(0.0, end - time.monotonic()))]

    def _take_beside(self, landed: NDArray[np.bool_], timeout_s: float | None) -> Moved:
        if self._beside is None:
            return Moved()
        if timeout_s is not None and not self._beside.ticket.done(0.0):
            self._store.leave(self._beside)
            landed[self._beside.rows] = False
            return Moved()
        moved = self._beside.ticket.wait()
        self._out.numpy()[self._beside.rows] = self._beside.buffer.numpy()
        return moved

    def _land(self, flight: Flight) -> Moved:
        try:
            return self._store.land(flight)
        except StorageError:  # its slots are lost: ``_copy`` reads their slices again, and raises if that fails too
            return Moved()

    def _copy(self) -> Moved:
        """Copy what is there; slices that had been in their slots before this read count as moved from host memory."""
        store = self._store
        lost = store.is_lost(self._slots)
        again = self._read_again(lost) if lost.any() else Moved()
        there = ~store.is_busy(self._slots) & ~lost
        rows, slots = self._rows[there], self._slots[there]
        self._out.numpy()[rows] = store.memory.numpy()[slots]  # torch would take byte by byte
        mine = [flight.slots for flight in self._mine]
        n_hits = len(slots) - (int(np.isin(slots, np.concatenate(mine)).sum()) if mine else 0)
        return again + Moved(cpu=n_hits * store.shape.slice_bytes)

    def _read_again(self, lost: NDArray[np.bool_]) -> Moved:
        pages, pieces = (torch.from_numpy(ids) for ids in np.divmod(self._keys[lost], self._store.shape.n_slices))
        rows = torch.from_numpy(self._rows[lost])
        return self._store.inner.read_scattered(self._layer, pages, pieces, self._out, rows).wait()
