"""Anchors of one layer: the sinks and the recent window, always on the device, with page sealing.

A slot is a token's place in the (left-padded) sequence. Sinks are the first real tokens of each row; the middle
region begins at slot ``sinks`` for every row, so pages are aligned across rows and a padded row's early page tokens
simply do not count.
"""

import torch
from torch import Tensor

from kvoffload.buffers import tensor_bytes
from kvoffload.values import Pages


def sealed_pages(n_tokens: int, *, sinks: int, recent: int, page_size: int) -> int:
    """Pages that have left the recent window when there are ``n_tokens``."""
    return max(n_tokens - sinks - _whole_pages(recent, page_size), 0) // page_size


class Anchors:
    """Buffers of fixed size: ``n_sinks`` places, then a ring of window places, K and V each.

    After every append the window holds at least min(tokens, recent) tokens and less than one page more than it must;
    what exceeds it leaves as sealed pages. A key is in exactly one of sinks, window and sealed pages.
    """

    def __init__(
        self, rows: int, n_sinks: int, recent: int, page_size: int, first_keys: Tensor, first_values: Tensor
    ) -> None:
        self.n_sinks, self.page_size = n_sinks, page_size
        self._recent = _whole_pages(recent, page_size)
        self._capacity = self._recent + page_size
        places = n_sinks + self._capacity
        self.keys = first_keys.new_zeros(rows, places, first_keys.shape[-1])
        self.values = first_values.new_zeros(rows, places, first_values.shape[-1])
        self.n_tokens = 0
        self.n_window = 0
        self.padding: Tensor | None = None  # leading slots of each row that hold no token, int64 [rows]

    @property
    def resident_bytes(self) -> int:
        return tensor_bytes(self.keys, self.values)

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def copy_from(self, other: "Anchors") -> None:
        """The same tokens in the same places."""
        self.keys.copy_(other.keys)
        self.values.copy_(other.values)
        self.n_tokens, self.n_window, self.padding = other.n_tokens, other.n_window, other.padding

    @property
    def n_sealed(self) -> int:
        """Pages sealed so far; page p holds the slots from n_sinks + p * page_size on."""
        return (max(self.n_tokens - self.n_sinks, 0) - self.n_window) // self.page_size

    def append(self, keys: Tensor, values: Tensor) -> Pages | None:
        """Add tokens [rows, n, D], [rows, n, Dv]; returns the pages that sealed, oldest first, or None.

        The pages may be views of the window: use them before the next append.
        """
        first = self.n_tokens
        self.n_tokens += keys.shape[1]
        self._fill_sinks(first, keys, values)
        skip = max(self.n_sinks - first, 0)
        if skip >= keys.shape[1]:
            return None
        if keys.shape[1] == 1:
            place = self.newest_place
            self.keys[:, place : place + 1], self.values[:, place : place + 1] = keys, values
            self.n_tokens = first
            start = self.count()
            return None if start is None else self._page(start)
        return self._append_many(keys[:, skip:], values[:, skip:])

    def count(self) -> int | None:
        """Count a token that will be written to ``newest_place``, the sinks being full; the first place of the page
        that seals, if one does."""
        self.n_tokens += 1
        self.n_window += 1
        if self.n_window < self._capacity:
            return None
        start = self.n_sinks + self._ring(self._window_start)
        self.n_window -= self.page_size
        return start

    def page_at(self, places: Tensor, tokens: Tensor) -> Pages:
        """The page in these places, its tokens those of these numbers among all of the pages, int64 [S] both, where the
        anchors are; a copy."""
        keys, values = (buffer.index_select(1, places)[:, None] for buffer in self.buffers)
        valid = None if self.padding is None else (tokens >= self.padding[:, None])[:, None]
        return Pages(keys, values, valid)

    @property
    def newest_place(self) -> int:
        """Where the newest token lies that is no sink."""
        return self.n_sinks + self._ring(self.n_tokens - 1)

    @property
    def sinks_are_full(self) -> bool:
        """Whether every row has all of its sinks; waits for the device where rows are padded."""
        longest = 0 if self.padding is None else int(self.padding.max())
        return self.n_tokens >= self.n_sinks + longest

    def in_order(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of one of the ``buffers`` as they came, without padding: those of the sinks, then those of the
        window."""
        places = [self.n_sinks + self._ring(self._window_start + i) for i in range(self.n_window)]
        return buffer[:, : min(self.n_sinks, self.n_tokens)], buffer[:, places]

    def valid(self) -> Tensor:
        """Which anchor places hold a token, bool [rows or 1, A]."""
        return self.seen(1)[:, 0]

    def seen(self, n_queries: int) -> Tensor:
        """Which anchor places the newest ``n_queries`` tokens see, each those up to itself: bool [rows or 1, Q, A]."""
        slots = self._slots()
        newest = torch.arange(self.n_tokens - n_queries, self.n_tokens, device=slots.device)
        seen = slots[:, None] <= newest[:, None]
        if self.padding is None:
            return seen
        real = (slots >= self.padding[:, None] + self.n_sinks)[:, None]
        real[..., : self.n_sinks] = True
        return seen & real

    @property
    def n_unsealing(self) -> int:
        """How many tokens can come before one seals a page; 0 where the next one does."""
        return max(self.n_sinks - self.n_tokens, 0) + self._capacity - 1 - self.n_window

    def page_valid(self, page_ids: Tensor, row_ids: Tensor) -> Tensor | None:
        """Which tokens of the given pages count, bool [F, S]; None when all do."""
        if self.padding is None:
            return None
        slots = self.n_sinks + page_ids[:, None] * self.page_size + torch.arange(self.page_size, device=page_ids.device)
        return slots >= self.padding[row_ids][:, None] + self.n_sinks

    def run_valid(self, first: int, n_pages: int) -> Tensor | None:
        """As ``page_valid`` for consecutive pages of all rows, bool [rows, n_pages, S]."""
        if self.padding is None:
            return None
        run = (first * self.page_size, (first + n_pages) * self.page_size)
        real = torch.arange(*run, device=self.padding.device) >= self.padding[:, None]
        return real.view(-1, n_pages, self.page_size)

    def crop(self, n_tokens: int) -> None:
        """Forget the newest tokens; only what is still in the window can go."""
        if n_tokens > self.n_window:
            raise ValueError(f"cannot crop {n_tokens} tokens: only the newest {self.n_window} are not sealed yet")
        self.n_tokens -= n_tokens
        self.n_window -= n_tokens

    def _slots(self) -> Tensor:
        """The slot of the token in each place, int64 [rows or 1, A]; one that is still to come where there is none."""
        place = torch.arange(self._capacity, device=self.keys.device)
        window = self._window_start + (place - self._ring(self._window_start)) % self._capacity
        sinks = torch.arange(self.n_sinks, device=self.keys.device)
        if self.padding is None:
            return torch.cat([sinks, window])[None]
        sinks = self.padding[:, None] + sinks
        return torch.cat([sinks, window.expand(len(sinks), -1)], dim=1)

    @property
    def _window_start(self) -> int:
        """Slot of the oldest token in the window."""
        return max(self.n_tokens, self.n_sinks) - self.n_window

    def _ring(self, slot: int) -> int:
        return (slot - self.n_sinks) % self._capacity

    def _fill_sinks(self, first: int, keys: Tensor, values: Tensor) -> None:
        """Copy those of the new tokens (slots from ``first`` on) that are a row's sinks."""
        if self.padding is None:
            stop = min(self.n_sinks, self.n_tokens)
            if first < stop:
                self.keys[:, first:stop] = keys[:, : stop - first]
                self.values[:, first:stop] = values[:, : stop - first]
            return
        sinks = torch.arange(self.n_sinks, device=keys.device)
        source = self.padding[:, None] + sinks - first
        inside = ((source >= 0) & (source < keys.shape[1]))[..., None]
        index = source.clamp(0, keys.shape[1] - 1)[..., None]
        for buffer, new in ((self.keys, keys), (self.values, values)):
            taken = new.gather(1, index.expand(-1, -1, new.shape[-1]))
            buffer[:, : self.n_sinks] = torch.where(inside, taken, buffer[:, : self.n_sinks])

    def _append_many(self, keys: Tensor, values: Tensor) -> Pages | None:
        places = [self.n_sinks + self._ring(self._window_start_before(keys) + i) for i in range(self.n_window)]
        keys, values = torch.cat([self.keys[:, places], keys], 1), torch.cat([self.values[:, places], values], 1)
        n_pages = max(keys.shape[1] - self._recent, 0) // self.page_size
        first_page, sealed = self._first_page(keys.shape[1]), n_pages * self.page_size
        self.n_window = keys.shape[1] - sealed
        places = [self.n_sinks + self._ring(self._window_start + i) for i in range(self.n_window)]
        self.keys[:, places], self.values[:, places] = keys[:, sealed:], values[:, sealed:]
        if n_pages == 0:
            return None
        shape = (n_pages, self.page_size)
        valid = self.run_valid(first_page, n_pages)
        return Pages(keys[:, :sealed].unflatten(1, shape), values[:, :sealed].unflatten(1, shape), valid)

    def _page(self, start: int) -> Pages:
        """The page that sealed just now; views."""
        page = slice(start, start + self.page_size)  # the ring is whole pages, so a page never wraps
        return Pages(self.keys[:, None, page], self.values[:, None, page], self.run_valid(self.n_sealed - 1, 1))

    def _window_start_before(self, new: Tensor) -> int:
        return max(self.n_tokens, self.n_sinks) - new.shape[1] - self.n_window

    def _first_page(self, n_unsealed: int) -> int:
        return (max(self.n_tokens, self.n_sinks) - self.n_sinks - n_unsealed) // self.page_size


def _whole_pages(n_tokens: int, page_size: int) -> int:
    """Rounded up."""
    return -(-n_tokens // page_size) * page_size
