"""The contract of a page store: immutable pages of bytes, appended per layer, read by slice or by run.

A page is ``n_slices`` slices of ``slice_bytes`` each; a slice is the unit of a hot read (one kv head's K and V of one
page), a page the unit of a write. Stores know nothing of heads or attention.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .aligned import aligned_empty

if TYPE_CHECKING:
    from .segments import Sealed


@dataclass(frozen=True)
class StoreShape:
    """What one page of every layer looks like, in bytes."""

    n_layers: int
    n_slices: int
    slice_bytes: int

    @property
    def page_bytes(self) -> int:
        return self.n_slices * self.slice_bytes


@dataclass(frozen=True)
class Moved:
    """Bytes that one read or write really moved, per tier; alignment surplus included."""

    cpu: int = 0
    nvme: int = 0

    def __add__(self, other: "Moved") -> "Moved":
        return Moved(self.cpu + other.cpu, self.nvme + other.nvme)


class Ticket(ABC):
    """A read under way."""

    def done(self, timeout_s: float | None) -> bool:
        """Whether ``wait`` would return at once, after waiting for it at most that long (None: as long as it takes). A
        ticket that cannot know says so at once."""
        return True

    @abstractmethod
    def wait(self) -> Moved:
        """Return when the caller's buffer is filled; raise what the read failed with. May be called once."""

    def settle(self, timeout_s: float) -> "tuple[Moved, NDArray[np.bool_] | None]":
        """In the place of ``wait``: which rows are filled after at most that long, bool [n] (None: all), and what was
        moved for them. The others never will be. A store that cannot give a part waits for all."""
        return self.wait(), None


class Store(ABC):
    """Pages of one sequence batch. Not thread-safe: one thread calls it; it may use threads of its own.

    Page ids of a layer count from 0 in the order of ``append``. A page never changes once it was appended.
    """

    shape: StoreShape
    tier: str

    @property
    def note(self) -> str:
        """What a user should be told about how this store works here; empty when there is nothing."""
        return ""

    @property
    def reads_to_device(self) -> bool:
        """Whether ``read_slices`` takes an ``out`` on a CUDA device too, and saves a copy by it."""
        return False

    @property
    @abstractmethod
    def slice_cost_bytes(self) -> int:
        """Bytes that reading one lone slice moves at most (>= shape.slice_bytes; larger where reads are aligned)."""

    @abstractmethod
    def n_pages(self, layer: int) -> int:
        """Pages appended to this layer so far."""

    @abstractmethod
    def append(self, layer: int, pages: Tensor) -> Moved:
        """Add pages at the end of a layer; uint8 [n, n_slices, slice_bytes] on any device, n may be 0.

        The tensor may be reused when the call returns. A page can be read at once, also while its write is under way.
        Raises CapacityError when there is no room, and then keeps every page appended before. A store that finds out
        during the call (a write behind it failed) may have taken a first part of ``pages``; ``n_pages`` says how many.
        """

    @abstractmethod
    def read_slices(self, layer: int, page_ids: Tensor, slice_ids: Tensor, out: Tensor) -> Ticket:
        """Start reading slice ``slice_ids[i]`` of page ``page_ids[i]`` into ``out[i]``.

        Ids are int64 [n] in host memory, in any order, repeats allowed, n may be 0; ``out`` is uint8 [n, slice_bytes],
        contiguous, in host memory for the cpu and nvme tiers (but see ``reads_to_device``), and belongs to the store
        until ``Ticket.wait`` returns.
        """

    def read_scattered(self, layer: int, page_ids: Tensor, slice_ids: Tensor, memory: Tensor, places: Tensor) -> Ticket:
        """As ``read_slices``, but slice i goes into ``memory[places[i]]``; places are int64 [n] and distinct."""
        out = aligned_empty(len(page_ids) * self.shape.slice_bytes).view(-1, self.shape.slice_bytes)
        return _ScatterTicket(self.read_slices(layer, page_ids, slice_ids, out), out, memory, places)

    def ahead(self, layer: int, page_ids: Tensor, slice_ids: Tensor) -> None:  # noqa: B027 - most have no such tier
        """Slices that will probably be asked for: a store with a faster tier before it may begin to bring them there.
        Ids as in ``read_slices``. Never raises what the disk did; the read that asks for them does."""

    def moved_unasked(self, layer: int) -> Moved:
        """What reads of this layer moved since the last call that no ticket told of: of ``ahead``, and late ones."""
        return Moved()

    @abstractmethod
    def read_pages(self, layer: int, first: int, out: Tensor) -> Ticket:
        """Start reading ``len(out)`` whole pages from page ``first`` on; out is uint8 [n, n_slices, slice_bytes].

        Whole pages are verified against their checksum where the tier keeps one (IntegrityError).
        """

    @abstractmethod
    def mapped(self, layer: int) -> Tensor | None:
        """The layer's pages as memory, uint8 [>= n_pages, n_slices, slice_bytes], or None if they are not addressable.

        Valid until the next ``append`` to this layer. Who reads through it counts the bytes.
        """

    def reserve(self, n_pages: int) -> bool:
        """Whether every layer has memory for ``n_pages`` pages now, so that ``mapped`` gives the same until there are
        more; False, and nothing changes, where there is no such memory."""
        return False

    @abstractmethod
    def flush(self) -> None:
        """Return when everything appended is where the tier keeps it."""

    def seal(self) -> "Sealed | None":
        """After a flush and a sync, files that hold every page appended so far for good, for a session to link to; None
        where the tier has no files. Pages may be appended afterwards."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give back memory, files and threads; temporary files are removed. A second call does nothing."""


class _ScatterTicket(Ticket):
    def __init__(self, inner: Ticket, out: Tensor, memory: Tensor, places: Tensor) -> None:
        self._inner, self._out, self._memory, self._places = inner, out, memory, places

    def done(self, timeout_s: float | None) -> bool:
        return self._inner.done(timeout_s)

    def wait(self) -> Moved:
        moved = self._inner.wait()
        self._memory[self._places] = self._out
        return moved
