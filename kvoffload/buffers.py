"""A tensor that grows along its second dimension, for digests and summaries that are kept per page."""

import torch
from torch import Tensor


class Growing:
    """[rows, n, ...] with amortised appends; ``view`` is valid until the next append."""

    def __init__(self) -> None:
        self._data: Tensor | None = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def view(self) -> Tensor:
        assert self._data is not None, "nothing was appended yet"
        return self._data[:, : self._length]

    @property
    def used_bytes(self) -> int:
        return 0 if self._data is None else self.view.numel() * self._data.itemsize

    def append(self, rows: Tensor) -> None:
        """Add rows [rows, k, ...] at the end."""
        end = self._length + rows.shape[1]
        if self._data is None or end > self._data.shape[1]:
            grown = rows.new_empty(rows.shape[0], max(end, 2 * self._length), *rows.shape[2:])
            if self._data is not None:
                grown[:, : self._length] = self.view
            self._data = grown
        self._data[:, self._length : end] = rows
        self._length = end

    def truncate(self, length: int) -> None:
        """Forget everything behind the first ``length`` entries."""
        self._length = min(length, self._length)


def tensor_bytes(*tensors: Tensor) -> int:
    """Bytes that these tensors hold."""
    return sum(t.numel() * t.itemsize for t in tensors)


def page_mask(page_ids: Tensor, row_ids: Tensor, rows: int, n_pages: int) -> Tensor:
    """bool [rows, P], true at the given (row, page) pairs."""
    mask = torch.zeros(rows * n_pages, dtype=torch.bool, device=page_ids.device)
    return mask.index_fill_(0, row_ids * n_pages + page_ids, True).view(rows, n_pages)
