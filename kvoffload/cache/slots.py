"""Where fetched slices land on the device: staging that is written anew each step, or a page cache with LRU slots."""

from abc import ABC, abstractmethod

import torch
from kvoffload_kernels.cache_slots.reference import Hits, Table
from kvoffload_kernels.dispatch import assign_slots
from torch import Tensor

from kvoffload.buffers import tensor_bytes


class Slots(ABC):
    """Places of one slice each. ``data`` is uint8 [C, slice_bytes] on the device."""

    data: Tensor
    places: int | None = None
    """Slices that are kept from step to step; None where none are meant to be."""
    staging: "Staging"
    """Where slices go that are not kept."""

    @abstractmethod
    def admit(self, keys: Tensor, n_keys: int, hits: Hits | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Places for distinct slices, named by int64 keys [F] below ``n_keys``: (places [F], hit bool [F], missed bool
        [F]), with the hits added to ``hits``; None when nothing is kept and all of them go to ``reserve``. What missed
        must be written to its place before ``data`` is read. A key of -1 is no slice: its place is one that no slice
        gets. Tensors move only where there are more keys than ever before."""

    @abstractmethod
    def reserve(self, n_slices: int) -> Tensor:
        """Room for a step whose slices are not kept, uint8 [n_slices, slice_bytes]; lost at the next call."""

    def forget(self) -> None:  # noqa: B027 - what keeps nothing has nothing to forget
        """What was admitted may never have been written: nothing is kept any more."""

    @property
    @abstractmethod
    def resident_bytes(self) -> int:
        """Device bytes of what is kept from step to step."""


class Staging(Slots):
    """No cache. Layers share one staging, since each has used its slices before the next one asks; where they look
    ahead, two in turn."""

    def __init__(self, slice_bytes: int, device: torch.device) -> None:
        self.staging = self
        self.data = torch.empty(0, slice_bytes, dtype=torch.uint8, device=device)

    def admit(self, keys: Tensor, n_keys: int, hits: Hits | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        return None

    def reserve(self, n_slices: int) -> Tensor:
        if n_slices > self.data.shape[0]:
            self.data = self.data.new_zeros(n_slices, self.data.shape[1])  # a place may be read and not count
        return self.data[:n_slices]

    @property
    def resident_bytes(self) -> int:
        return 0


def key_room(n_keys: int) -> int:
    """Keys that a page cache makes room for where there are so many: a power of two, so that it seldom grows."""
    return 1 << max(n_keys - 1, 0).bit_length()


class PageCache(Slots):
    """Least recently used; look-ups are tensor operations on the keys' device, so nothing waits for the host. They take
    four bytes for each key there may be, beside the places.

    A step that selects more slices than there are places passes the cache by: its size is a bound.
    """

    places: int

    def __init__(self, n_slots: int, slice_bytes: int, device: torch.device, staging: Staging | None = None) -> None:
        self.staging = staging or Staging(slice_bytes, device)
        self.places = n_slots
        self.data = torch.zeros(n_slots + 1, slice_bytes, dtype=torch.uint8, device=device)  # and one for no slice
        self._table = Table.empty(n_slots, 0, device)

    def admit(self, keys: Tensor, n_keys: int, hits: Hits | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        if keys.shape[0] > self.places:
            return None
        if keys.device != self._table.owners.device:  # who has the places is kept where the keys come from
            self._table = Table.empty(self.places, 0, keys.device)
        if n_keys > self._table.n_keys:
            grown = Table.empty(0, key_room(n_keys), keys.device).slot_of
            grown[: self._table.n_keys] = self._table.slot_of[:-1]
            self._table = self._table._replace(slot_of=grown)
        return assign_slots(keys, self._table, hits)

    def reserve(self, n_slices: int) -> Tensor:
        return self.staging.reserve(n_slices)

    @property
    def resident_bytes(self) -> int:
        return tensor_bytes(self.data[:-1]) + self.table_bytes

    @property
    def table_bytes(self) -> int:
        """Of the look-up by key, where it is on the places' device."""
        slot_of = self._table.slot_of
        return tensor_bytes(slot_of) if slot_of.device == self.data.device else 0

    def forget(self) -> None:
        self._table = Table.empty(self.places, self._table.n_keys, self._table.owners.device)
