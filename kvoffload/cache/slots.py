"""Where fetched slices land on the device: staging that is written anew each step, or a page cache with LRU slots."""

from abc import ABC, abstractmethod

import torch
from kvoffload_kernels.cache_slots.reference import assign_slots
from torch import Tensor

from kvoffload.buffers import tensor_bytes


class Slots(ABC):
    """Places of one slice each. ``data`` is uint8 [C, slice_bytes] on the device."""

    data: Tensor

    @abstractmethod
    def admit(self, keys: Tensor) -> tuple[Tensor, Tensor] | None:
        """Places for distinct slices, named by int64 keys [F]: (places [F], hit bool [F]); None when all of them
        missed and belong in places 0 .. F - 1. What missed must be written to its place before ``data`` is read."""

    def reserve(self, n_slices: int) -> Tensor:
        """The first ``n_slices`` places, for a step that ``admit`` gave None; what was in them is lost."""
        if n_slices > self.data.shape[0]:
            self.data = torch.empty(n_slices, self.data.shape[1], dtype=torch.uint8, device=self.data.device)
        return self.data[:n_slices]

    @property
    def resident_bytes(self) -> int:
        return tensor_bytes(self.data)


class Staging(Slots):
    """No cache: slice i of a step lands in place i."""

    def __init__(self, slice_bytes: int, device: torch.device) -> None:
        self.data = torch.empty(0, slice_bytes, dtype=torch.uint8, device=device)

    def admit(self, keys: Tensor) -> tuple[Tensor, Tensor] | None:
        return None


class PageCache(Slots):
    """Least recently used; look-ups are tensor operations on the keys' device, so nothing waits for the host.

    A step that selects more slices than there are places makes the cache grow to hold them.
    """

    def __init__(self, n_slots: int, slice_bytes: int, device: torch.device) -> None:
        self._start(n_slots, slice_bytes, device, device)

    def admit(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        n_slots, slice_bytes = self.data.shape
        if keys.shape[0] > n_slots or keys.device != self._owners.device:
            self._start(max(n_slots, keys.shape[0]), slice_bytes, self.data.device, keys.device)
        self._now += 1
        return assign_slots(keys, self._owners, self._last_used, self._now)

    def _start(self, n_slots: int, slice_bytes: int, device: torch.device, table_device: torch.device) -> None:
        """Empty places on ``device``; the table that says who owns them is where the keys come from."""
        self.data = torch.empty(n_slots, slice_bytes, dtype=torch.uint8, device=device)
        self._owners = torch.full((n_slots,), -1, device=table_device)
        self._last_used = torch.zeros(n_slots, dtype=torch.int64, device=table_device)
        self._now = torch.zeros((), dtype=torch.int64, device=table_device)
