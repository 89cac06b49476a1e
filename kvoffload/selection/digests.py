"""A selector that keeps a few numbers of every page, made of that page alone."""

from abc import abstractmethod

import torch
from torch import Tensor

from kvoffload.buffers import Growing, Room
from kvoffload.selection.base import Selector
from kvoffload.values import Pages


class DigestSelector(Selector):
    """Digests of all pages, in ``n_digests`` buffers [rows, P, ...]."""

    n_digests: int = 1
    row_state = ("_buffers",)

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset(torch.empty(0))

    @abstractmethod
    def digest(self, pages: Pages) -> tuple[Tensor, ...]:
        """The digests [rows, P, ...] of pages on the selector's device."""

    @property
    def digests(self) -> tuple[Tensor, ...]:
        """Those of all pages; in room while held."""
        return tuple(buffer.view for buffer in self._buffers)

    def reset(self, anchor: Tensor) -> None:
        self._buffers = tuple(Growing() for _ in range(self.n_digests))
        self.room: Room | None = None

    def absorb(self, pages: Pages) -> None:
        for buffer, digest in zip(self._buffers, self.digest(pages.to(self.device)), strict=True):
            buffer.append(digest)

    def note(self) -> None:
        for buffer in self._buffers:
            buffer.count(len(buffer) + 1)

    def put(self, page: Pages) -> None:
        assert self.room is not None, "a page is put while held"
        for buffer, digest in zip(self._buffers, self.digest(page), strict=True):
            buffer.put(self.room.newest, digest)

    @property
    def can_hold(self) -> bool:
        return len(self._buffers[0]) > 0

    def hold(self, room: Room | None) -> None:
        self.room = room
        for buffer in self._buffers:
            buffer.hold(None if room is None else room.n_pages)

    @property
    def index_bytes(self) -> int:
        return sum(buffer.used_bytes for buffer in self._buffers)

    @property
    def resident_bytes(self) -> int:
        return sum(buffer.held_bytes for buffer in self._buffers)
