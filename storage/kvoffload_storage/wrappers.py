"""Stores around a store: counting what moves, adding latency, failing on purpose; all keep its contract."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .segments import Sealed
from .store import Moved, Store, Ticket

Operation = Literal["append", "read_slices", "read_pages", "wait", "flush", "seal"]


class WrapperStore(Store):
    """Hands everything to ``inner``; a base for the others."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.shape = inner.shape
        self.tier = inner.tier

    @property
    def note(self) -> str:
        return self.inner.note

    @property
    def reads_to_device(self) -> bool:
        return self.inner.reads_to_device

    @property
    def slice_cost_bytes(self) -> int:
        return self.inner.slice_cost_bytes

    def n_pages(self, layer: int) -> int:
        return self.inner.n_pages(layer)

    def append(self, layer: int, pages: Tensor) -> Moved:
        return self.inner.append(layer, pages)

    def read_slices(self, layer: int, page_ids: Tensor, slice_ids: Tensor, out: Tensor) -> Ticket:
        return self.inner.read_slices(layer, page_ids, slice_ids, out)

    def read_scattered(self, layer: int, page_ids: Tensor, slice_ids: Tensor, memory: Tensor, places: Tensor) -> Ticket:
        return self.inner.read_scattered(layer, page_ids, slice_ids, memory, places)

    def ahead(self, layer: int, page_ids: Tensor, slice_ids: Tensor) -> None:
        self.inner.ahead(layer, page_ids, slice_ids)

    def moved_unasked(self, layer: int) -> Moved:
        return self.inner.moved_unasked(layer)

    def read_pages(self, layer: int, first: int, out: Tensor) -> Ticket:
        return self.inner.read_pages(layer, first, out)

    def mapped(self, layer: int) -> Tensor | None:
        return self.inner.mapped(layer)

    def reserve(self, n_pages: int) -> bool:
        return self.inner.reserve(n_pages)

    def flush(self) -> None:
        self.inner.flush()

    def seal(self) -> Sealed | None:
        return self.inner.seal()

    def close(self) -> None:
        self.inner.close()


class _AfterTicket(Ticket):
    """Calls ``after`` with what the inner ticket moved."""

    def __init__(self, inner: Ticket, after: Callable[[Moved], None]) -> None:
        self._inner = inner
        self._after = after

    def done(self, timeout_s: float | None) -> bool:
        return self._inner.done(timeout_s)

    def wait(self) -> Moved:
        moved = self._inner.wait()
        self._after(moved)
        return moved

    def settle(self, timeout_s: float) -> "tuple[Moved, NDArray[np.bool_] | None]":
        moved, landed = self._inner.settle(timeout_s)
        self._after(moved)
        return moved, landed


class TracingStore(WrapperStore):
    """Adds up what reads and writes moved, and what was asked for.

    A read counts in ``read`` when its ticket is waited for, in ``slices_asked`` and ``pages_asked`` when it starts.
    Reads through ``mapped`` are not seen.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.reset()

    def reset(self) -> None:
        """Count from zero again."""
        self.read = Moved()
        self.written = Moved()
        self.slices_asked = 0
        self.pages_asked = 0
        self.pages_appended = 0

    def append(self, layer: int, pages: Tensor) -> Moved:
        moved = self.inner.append(layer, pages)
        self.written += moved
        self.pages_appended += len(pages)
        return moved

    def read_slices(self, layer: int, page_ids: Tensor, slice_ids: Tensor, out: Tensor) -> Ticket:
        self.slices_asked += len(page_ids)
        return _AfterTicket(self.inner.read_slices(layer, page_ids, slice_ids, out), self._count)

    def read_pages(self, layer: int, first: int, out: Tensor) -> Ticket:
        self.pages_asked += len(out)
        return _AfterTicket(self.inner.read_pages(layer, first, out), self._count)

    def read_scattered(self, layer: int, page_ids: Tensor, slice_ids: Tensor, memory: Tensor, places: Tensor) -> Ticket:
        self.slices_asked += len(page_ids)
        return _AfterTicket(self.inner.read_scattered(layer, page_ids, slice_ids, memory, places), self._count)

    def _count(self, moved: Moved) -> None:
        self.read += moved


class LatencyStore(WrapperStore):
    """No read is over before ``seconds`` have passed since it started."""

    def __init__(self, inner: Store, seconds: float) -> None:
        super().__init__(inner)
        self.seconds = seconds

    def read_slices(self, layer: int, page_ids: Tensor, slice_ids: Tensor, out: Tensor) -> Ticket:
        return self._late(self.inner.read_slices(layer, page_ids, slice_ids, out))

    def read_scattered(self, layer: int, page_ids: Tensor, slice_ids: Tensor, memory: Tensor, places: Tensor) -> Ticket:
        return self._late(self.inner.read_scattered(layer, page_ids, slice_ids, memory, places))

    def read_pages(self, layer: int, first: int, out: Tensor) -> Ticket:
        return self._late(self.inner.read_pages(layer, first, out))

    def _late(self, ticket: Ticket) -> Ticket:
        return _LateTicket(ticket, time.monotonic() + self.seconds)


class _LateTicket(Ticket):
    def __init__(self, inner: Ticket, ready_s: float) -> None:
        self._inner, self._ready_s = inner, ready_s

    def done(self, timeout_s: float | None) -> bool:
        left = max(0.0, self._ready_s - time.monotonic())
        if timeout_s is not None and left > timeout_s:
            time.sleep(timeout_s)
            return False
        time.sleep(left)
        return self._inner.done(None if timeout_s is None else timeout_s - left)

    def wait(self) -> Moved:
        time.sleep(max(0.0, self._ready_s - time.monotonic()))
        return self._inner.wait()


@dataclass(frozen=True)
class Fault:
    """What goes wrong at the ``call``-th call (from 1) of an operation: an error, or damage to what was read.

    "wait" counts the waits for reads of both kinds; ``damage`` gets the filled ``out`` and is for "wait" only.
    """

    operation: Operation
    call: int
    error: Exception | None = None
    damage: Callable[[Tensor], None] | None = None


def flip_bit(out: Tensor) -> None:
    """Damage: the lowest bit of the first byte is another."""
    out.view(-1)[0] ^= 1


def cut_short(out: Tensor) -> None:
    """Damage: the second half never arrived."""
    out.view(-1)[out.numel() // 2 :] = 0


class FaultyStore(WrapperStore):
    """Fails where ``fail_on`` says, and works otherwise."""

    def __init__(self, inner: Store, fail_on: Sequence[Fault]) -> None:
        super().__init__(inner)
        self._faults = {(fault.operation, fault.call): fault for fault in fail_on}
        self._calls: Counter[str] = Counter()

    def append(self, layer: int, pages: Tensor) -> Moved:
        self._enter("append")
        return self.inner.append(layer, pages)

    def read_slices(self, layer: int, page_ids: Tensor, slice_ids: Tensor, out: Tensor) -> Ticket:
        self._enter("read_slices")
        ticket = self.inner.read_slices(layer, page_ids, slice_ids, out)
        return _AfterTicket(ticket, lambda moved: self._damage(out))

    def read_pages(self, layer: int, first: int, out: Tensor) -> Ticket:
        self._enter("read_pages")
        ticket = self.inner.read_pages(layer, first, out)
        return _AfterTicket(ticket, lambda moved: self._damage(out))

    def read_scattered(self, layer: int, page_ids: Tensor, slice_ids: Tensor, memory: Tensor, places: Tensor) -> Ticket:
        self._enter("read_slices")
        ticket = self.inner.read_scattered(layer, page_ids, slice_ids, memory, places)
        return _AfterTicket(ticket, lambda moved: self._damage(memory[places[0]] if len(places) else places))

    def flush(self) -> None:
        self._enter("flush")
        self.inner.flush()

    def seal(self) -> Sealed | None:
        self._enter("seal")
        return self.inner.seal()

    def _damage(self, out: Tensor) -> None:
        fault = self._enter("wait")
        if fault is not None and fault.damage is not None and out.numel():
            fault.damage(out)

    def _enter(self, operation: Operation) -> Fault | None:
        """Count the call; raise its error, or give back the fault that is due."""
        self._calls[operation] += 1
        fault = self._faults.get((operation, self._calls[operation]))
        if fault is not None and fault.error is not None:
            raise fault.error
        return fault
