"""Where fetched slices land on the device: staging that is written anew each step, or a page cache with LRU slots."""

from abc import ABC, abstractmethod

import torch
from kvoffload_kernels.cache_slots.reference import Hits
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
    def admit(self, keys: Tensor, hits: Hits | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Places for distinct slices, named by int64 keys [F]: (places [F], hit bool [F], missed bool [F]), with the
        hits added to ``hits``; None when nothing is kept and all of them go to ``reserve``. What missed must be written
        to its place before ``data`` is read. A key below 0 is no slice: its place is one that no slice gets."""

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

    def admit(self, keys: Tensor, hits: Hits | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        return None

    def reserve(self, n_slices: int) -> Tensor:
        if n_slices > self.data.shape[0]:
            self.data = self.data.new_zeros(n_slices, self.data.shape[1])  # a place may be read and not count
        return self.data[:n_slices]

    @property
    def resident_bytes(self) -> int:
        return 0


class PageCache(Slots):
    """Least recently used; look-ups are tensor operations on the keys' device, so nothing waits for the host.

    A step that selects more slices than there are places passes the cache by: its size is a bound.
    """

    def __init__(self, n_slots: int, slice_bytes: int, device: torch.device, staging: Staging | None = None) -> None:
        self.staging = staging or Staging(slice_bytes, device)
        self.places = n_slots
        self.data = torch.zeros(n_slots + 1, slice_bytes, dtype=torch.uint8, device=device)  # and one for no slice
        self._start_table(device)

    def admit(self, keys: Tensor, hits: Hits | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
        if keys.shape[0] > self._owners.shape[0]:
            return None
        if keys.device != self._owners.device:
            self._start_table(keys.device)
        return assign_slots(keys, self._owners, self._last_used, self._now, hits)

    def reserve(self, n_slices: int) -> Tensor:
        return self.staging.reserve(n_slices)

    @property
    def resident_bytes(self) -> int:
        return tensor_bytes(self.data[:-1])

    def forget(self) -> None:
        self._start_table(self._owners.device)

    def _start_table(self, device: torch.device) -> None:
        """Who owns the places is kept where the keys come from."""
        n_slots = self.data.shape[0] - 1
        self._owners = torch.full((n_slots,), -1, device=device)
        self._last_used = torch.zeros(n_slots, dtype=torch.int64, device=device)
        self._now = torch.zeros((), dtype=torch.int64, device=device)
