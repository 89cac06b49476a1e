"""Pages in memory: pinned or pageable host memory, or a device's own."""

import torch
from torch import Tensor

from .aligned import aligned_empty
from .checks import check_page_read, check_pages, check_slice_read
from .errors import CapacityError
from .store import Moved, Store, StoreShape, Ticket
from .tickets import DoneTicket


class MemoryStore(Store):
    """One tensor per layer, tier "cpu" or, on an accelerator or when asked for, "gpu".

    ``capacity_pages`` per layer are allocated at once; beyond them a layer doubles, and holds its old and its new
    tensor for the time of the copy. ``max_bytes`` bounds what the tensors of all layers take together. On the gpu tier
    ``out`` lies on the store's device, and nothing counts as moved. Reads are over when they return their ticket.

    Pages that come from a GPU into pinned memory are copied on its current stream without waiting: what reads them
    through ``mapped`` on that stream is ordered behind the copy, and reads by the host wait for it.
    """

    def __init__(
        self,
        shape: StoreShape,
        *,
        device: str | torch.device = "cpu",
        tier: str | None = None,
        pinned: bool = False,
        capacity_pages: int = 0,
        max_bytes: int | None = None,
    ) -> None:
        self.shape = shape
        self.device = torch.device(device)
        self.tier = tier or ("cpu" if self.device.type == "cpu" else "gpu")
        self._pinned = pinned
        self._max_bytes = max_bytes
        self._copying = False
        self._n_pages = [0] * shape.n_layers
        self._layers = [self._empty(0) for _ in range(shape.n_layers)]
        for layer in range(shape.n_layers if capacity_pages else 0):
            self._grow(layer, capacity_pages, capacity_pages)

    @property
    def slice_cost_bytes(self) -> int:
        return self.shape.slice_bytes

    @property
    def allocated_bytes(self) -> int:
        """What the tensors of all layers take, pages not yet appended included."""
        return sum(pages.numel() for pages in self._layers)

    def n_pages(self, layer: int) -> int:
        return self._n_pages[layer]

    def append(self, layer: int, pages: Tensor) -> Moved:
        check_pages(self.shape, pages)
        first = self._n_pages[layer]
        end = first + len(pages)
        if end > len(self._layers[layer]):
            self._grow(layer, end, max(end, 2 * len(self._layers[layer])))
        copying = pages.is_cuda and self._pinned
        self._layers[layer][first:end].copy_(pages, non_blocking=copying)
        self._copying |= copying
        self._n_pages[layer] = end
        return self._moved(pages)

    def read_slices(self, layer: int, page_ids: Tensor, slice_ids: Tensor, out: Tensor) -> Ticket:
        check_slice_read(self.shape, self._n_pages[layer], page_ids, slice_ids, out)
        self._settle()
        rows = (page_ids * self.shape.n_slices + slice_ids).to(self.device)
        torch.index_select(self._layers[layer].view(-1, self.shape.slice_bytes), 0, rows, out=out)
        return DoneTicket(self._moved(out))

    def read_pages(self, layer: int, first: int, out: Tensor) -> Ticket:
        check_page_read(self.shape, self._n_pages[layer], first, out)
        self._settle()
        out.copy_(self._layers[layer][first : first + len(out)])
        return DoneTicket(self._moved(out))

    def mapped(self, layer: int) -> Tensor | None:
        return self._layers[layer]

    def reserve(self, n_pages: int) -> bool:
        missing = sum(max(n_pages - len(pages), 0) for pages in self._layers) * self.shape.page_bytes
        if self._max_bytes is not None and self.allocated_bytes + missing > self._max_bytes:
            return False
        for layer, pages in enumerate(self._layers):
            if len(pages) < n_pages:
                self._grow(layer, n_pages, n_pages)
        return True

    def flush(self) -> None:
        return

    def close(self) -> None:
        self._n_pages = [0] * self.shape.n_layers
        self._layers = [self._empty(0) for _ in range(self.shape.n_layers)]

    def _settle(self) -> None:
        """Before the host reads: wait for copies that a GPU still makes into pinned memory."""
        if self._copying:
            torch.cuda.current_stream().synchronize()
            self._copying = False

    def _moved(self, tensor: Tensor) -> Moved:
        return Moved(cpu=tensor.numel() if self.tier == "cpu" else 0)

    def _grow(self, layer: int, needed: int, wanted: int) -> None:
        """Give a layer room for ``wanted`` pages, or for as many as the cap allows, but ``needed`` at least."""
        self._settle()
        old = self._layers[layer]
        capacity = max(needed, min(wanted, self._most_pages(layer)))
        total = self.allocated_bytes + (capacity - len(old)) * self.shape.page_bytes
        if self._max_bytes is not None and total > self._max_bytes:
            raise CapacityError(
                f"layer {layer}: {needed:,} pages of {self.shape.page_bytes:,} bytes bring the store to {total:,} "
                f"bytes, the cap is {self._max_bytes:,}"
            )
        new = self._empty(capacity)
        new[: self._n_pages[layer]].copy_(old[: self._n_pages[layer]])
        if self._pinned and len(old) and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # a GPU may still read what somebody else will write soon
        self._layers[layer] = new

    def _most_pages(self, layer: int) -> int:
        if self._max_bytes is None:
            return 1 << 62
        left = self._max_bytes - self.allocated_bytes
        return len(self._layers[layer]) + max(0, left) // self.shape.page_bytes

    def _empty(self, n_pages: int) -> Tensor:
        shape = (n_pages, self.shape.n_slices, self.shape.slice_bytes)
        if not n_pages:
            return torch.empty(shape, dtype=torch.uint8, device=self.device)
        if self.device.type == "cpu":
            return aligned_empty(n_pages * self.shape.page_bytes, pinned=self._pinned).view(shape)
        return _device_empty(shape, self.device)


def _device_empty(shape: tuple[int, int, int], device: torch.device) -> Tensor:
    try:
        return torch.empty(shape, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"{device}: no memory for {shape[0]:,} pages: {error}") from error
