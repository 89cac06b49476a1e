"""A few weighted entries (key, value, log weight) for every page: what ``chelsea`` and ``keepkv`` make of pages.

Entries belong to one page, so nothing has to be removed: a fetched page's entries are left out.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kvoffload.buffers import Growing
from kvoffload.completion.base import Completion, per_query
from kvoffload.values import Fetched, Pages, Partial, by_row


@dataclass(frozen=True)
class Entries:
    """Entries of pages, fp32: keys [..., M, D], values [..., M, Dv], log weights [..., M] (-inf is no entry)."""

    keys: Tensor
    values: Tensor
    log_weights: Tensor


class PageEntriesCompletion(Completion):
    """An entry counts as e^(log weight) tokens with its key and value."""

    def __init__(self, value_dim: int) -> None:
        self._value_dim = value_dim
        self.reset(torch.empty(0))

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        self._anchor = anchor
        self._keys, self._values, self._log_weights = Growing(), Growing(), Growing()

    @abstractmethod
    def make(self, pages: Pages) -> Entries:
        """The entries of pages, [rows, P, M]."""

    def absorb(self, pages: Pages) -> None:
        entries = self.make(pages)
        self._keys.append(entries.keys)
        self._values.append(entries.values)
        self._log_weights.append(entries.log_weights)

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        if len(self._keys) == 0:
            return Partial.empty(query, self._value_dim)
        keys, values = self._keys.view.flatten(1, 2), self._values.view.flatten(1, 2)
        read = fetched.mask(query.shape[0], len(self._keys))
        left = per_query(self._log_weights.view, query).masked_fill(read[..., None], -torch.inf).flatten(1)
        logits = (by_row(query, keys.shape[0]) @ keys.mT).view(*query.shape[:2], -1)
        return Partial.weigh(logits + left[:, None], values)

    @property
    def state_bytes(self) -> int:
        return self._keys.used_bytes + self._values.used_bytes + self._log_weights.used_bytes


def entry_bytes(n_tokens: int, page_size: int, n_entries: int, key_dim: int, value_dim: int) -> int:
    """Bytes of ``n_entries`` entries for each page of ``n_tokens`` tokens of one kv head."""
    return n_tokens // page_size * n_entries * (key_dim + value_dim + 1) * 4
