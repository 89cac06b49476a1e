"""A tensor that grows along its second dimension, for digests and summaries that are kept per page, and room in which
it keeps shape and address."""

import torch
from torch import Tensor

from kvoffload.streamed import streamed_empty


class Room:
    """A fixed number of places for pages, so that what a step reads keeps its shapes and addresses while pages come.
    ``beyond`` bool [n_pages] is true for places that have no page yet, ``newest`` int64 [1] is the last one that has,
    ``tokens`` int64 [page_size] are its tokens' numbers; who owns the room keeps them so."""

    def __init__(self, n_pages: int, page_size: int, device: torch.device) -> None:
        self.n_pages, self.n_tokens = n_pages, n_pages * page_size
        self.beyond = torch.ones(n_pages, dtype=torch.bool, device=device)
        self.newest = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.arange(page_size, device=device)

    @property
    def page_size(self) -> int:
        return len(self.tokens)

    def fill(self, n_used: int) -> None:
        """The first ``n_used`` places have pages."""
        self.beyond[:n_used].fill_(False)
        self.newest.fill_(n_used - 1)
        write_range(self.tokens, (n_used - 1) * self.page_size)

    def bound(self, scores: Tensor) -> Tensor:
        """Scores [..., n_pages], -inf where no page is; in place."""
        return scores.masked_fill_(self.beyond, -torch.inf)


_GROWTH = 8  # a full buffer gets room for an eighth of what it has


class Growing:
    """[rows, n, ...] with amortised appends; ``view`` is valid until the next append. What is ``streamed`` lies in host
    memory, where a GPU reads and writes it across the link."""

    def __init__(self, *, streamed: bool = False) -> None:
        self._empty = streamed_empty if streamed else Tensor.new_empty
        self._data: Tensor | None = None
        self._length = 0
        self._held: int | None = None

    def __len__(self) -> int:
        return self._length

    @property
    def view(self) -> Tensor:
        """What was appended; while held, with the zeros behind it."""
        assert self._data is not None, "nothing was appended yet"
        return self._data[:, : self._length if self._held is None else self._held]

    @property
    def used_bytes(self) -> int:
        return 0 if self._data is None else self._data[:, 0].numel() * self._length * self._data.itemsize

    @property
    def held_bytes(self) -> int:
        """With the room for what comes."""
        return 0 if self._data is None else tensor_bytes(self._data)

    def append(self, rows: Tensor) -> None:
        """Add rows [rows, k, ...] at the end."""
        end = self._length + rows.shape[1]
        if self._data is None or end > self._data.shape[1]:
            room = max(end, self._length * (_GROWTH + 1) // _GROWTH)
            self._replace(self._empty(rows, (rows.shape[0], room, *rows.shape[2:])))
        assert self._data is not None, "it was made just now"
        self._data[:, self._length : end] = rows
        self._length = end

    def put(self, at: Tensor, rows: Tensor) -> None:
        """While held: write rows [rows, k, ...] to the places ``at``, int64 [k] where they lie. The host counts them by
        ``count``."""
        assert self._data is not None, "nothing was appended yet"
        self._data.index_copy_(1, at, rows)

    def take(self, at: Tensor) -> Tensor:
        """The entries in these places, int64 [k] where they lie: [rows, k, ...], a copy."""
        return self.view.index_select(1, at)

    def count(self, length: int) -> None:
        """While held: there are so many entries now."""
        self._length = length

    def truncate(self, length: int) -> None:
        """Forget everything behind the first ``length`` entries."""
        self._length = min(length, self._length)

    def hold(self, n: int | None) -> None:
        """Make ``view`` ``n`` entries long, zeros behind those that were appended, and leave it where it is as long as
        no more are; None ends that. Something must have been appended."""
        self._held = n
        if n is None:
            return
        assert self._data is not None, "nothing was appended yet"
        if n > self._data.shape[1]:
            self._replace(self._empty(self._data, (self._data.shape[0], n, *self._data.shape[2:])))
        self._data[:, self._length : n] = 0

    def _replace(self, larger: Tensor) -> None:
        if self._data is not None:
            larger[:, : self._length] = self._data[:, : self._length]
            if self._empty is streamed_empty and larger.is_cuda:
                torch.cuda.synchronize(larger.device)  # host memory may be used again as soon as it is let go
        self._data = larger


def write_range(out: Tensor, first: int) -> None:
    """Consecutive numbers from ``first`` on, into int64 [n]."""
    torch.arange(first, first + len(out), out=out)


def tensor_bytes(*tensors: Tensor) -> int:
    """Bytes that these tensors hold."""
    return sum(t.numel() * t.itemsize for t in tensors)


def page_mask(page_ids: Tensor, row_ids: Tensor, rows: int, n_pages: int, wanted: Tensor | None = None) -> Tensor:
    """bool [rows, P], true at the given (row, page) pairs, or at those of them that are ``wanted`` (bool [F])."""
    mask = torch.zeros(rows * n_pages + 1, dtype=torch.bool, device=page_ids.device)
    places = row_ids * n_pages + page_ids
    if wanted is not None:
        places = torch.where(wanted, places, rows * n_pages)
    return mask.index_fill_(0, places, True)[:-1].view(rows, n_pages)
