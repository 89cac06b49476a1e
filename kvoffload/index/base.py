"""The contract of a token-level index: it restores every sealed key approximately, and scores queries against them."""

from abc import ABC, abstractmethod

import torch
from kvoffload_kernels.dense_attention.reference import soft_cap
from kvoffload_kernels.page_scores.reference import mask_pages, page_masses
from torch import Tensor

from kvoffload.buffers import Room
from kvoffload.rows import Rowwise
from kvoffload.values import KeySample, Pages, Partial


class KeyIndex(Rowwise, ABC):
    """Approximate keys of one layer, N tokens in order. Pages come in order, each once; queries are fp32 [rows, H, D],
    already scaled."""

    device: torch.device
    n_tokens: int
    hands_on: bool = False
    """Set by a completion that attends over the index: the logits of ``score`` are kept for it, once."""

    needs_logits: bool = False
    """Set by a completion that asks for every token's logit: then pages are scored by way of them."""

    streamed: bool = False
    """Whether what a query meets of each token lies in host memory, which the device reads across the link as it
    scores; set by ``stream``."""

    room: Room | None = None
    """Set by ``hold``: what scores and attends gives that many pages."""

    _scored: tuple[Tensor, Tensor] | None = None

    def stream(self) -> None:
        """Before the first page: from now on it is ``streamed``."""
        self.streamed = True
        self.reset()

    @property
    def span(self) -> int:
        """Tokens that logits are of: all of them, or all that the room has place for."""
        return self.n_tokens if self.room is None else self.room.n_tokens

    def score_pages(self, query: Tensor, page_size: int) -> Tensor:
        """Log mass of every page, fp32 [rows, H, P], for the selector, which comes first in a step."""
        if not self.needs_logits and self._fuses(query, page_size):
            return self._fused_pages(query, page_size, None if self.room is None else self.room.newest)
        scores = page_masses(self.score(query), page_size)
        return scores if self.room is None else self.room.bound(scores)

    def attend(self, query: Tensor, excluded: Tensor, page_size: int, softcap: float | None) -> Partial:
        """Attention over the restored keys of the pages that ``excluded`` bool [rows * Q, P] does not name, for queries
        [rows, Q * R, D] that may just have been scored: a partial of mean keys (anything finite where none is left)."""
        if self.room is not None:
            excluded = excluded | self.room.beyond
        if self._fuses(query, page_size):
            return self._fused_attention(query, excluded, page_size, softcap)
        return self.weigh(mask_pages(capped(self.logits_again(query), softcap), excluded, page_size))

    def _fuses(self, query: Tensor, page_size: int) -> bool:
        """Whether the two functions below work for these queries."""
        return False

    def _fused_pages(self, query: Tensor, page_size: int, newest: Tensor | None) -> Tensor:
        """``score_pages`` without any token's logit, of the pages up to the ``newest``."""
        raise NotImplementedError

    def _fused_attention(self, query: Tensor, excluded: Tensor, page_size: int, softcap: float | None) -> Partial:
        """``attend`` without any token's logit."""
        raise NotImplementedError

    @property
    def can_hold(self) -> bool:
        """Whether ``hold`` may be called now."""
        return False

    def hold(self, room: Room | None) -> None:
        """From now on queries read tensors that stay where they are while pages come into the room; None ends that."""
        self.room = room

    def note(self) -> None:
        """The host's part of an ``absorb`` of one page while held; see ``Selector.note``."""
        raise NotImplementedError

    def put(self, page: Pages) -> None:
        """The device's part."""
        raise NotImplementedError

    def newest_keys(self) -> Tensor:
        """While held: ``keys`` of the room's newest page, fp32 [rows, S, D], the same work for every page."""
        raise NotImplementedError

    def score(self, query: Tensor) -> Tensor:
        """``logits``, for the selector, which comes first in a step."""
        logits = self.logits(query)
        self._scored = (query, logits) if self.hands_on else None
        return logits

    def logits_again(self, query: Tensor) -> Tensor:
        """``logits`` of queries that may just have been scored; then they are handed on and forgotten here. Queries are
        the same if they lie in the same memory, which is kept until then, or on the host, if they are equal."""
        scored, self._scored = self._scored, None
        if scored is not None and _same(scored[0], query) and scored[1].shape[-1] == self.span:
            return scored[1]
        return self.logits(query)

    @abstractmethod
    def reset(self, sample: KeySample | None = None) -> None:
        """Forget every page; ``sample`` shows the keys that come and the queries that will ask."""

    @abstractmethod
    def absorb(self, pages: Pages) -> None:
        """Take in the next sealed pages; the tensors are not kept."""

    @abstractmethod
    def logits(self, query: Tensor) -> Tensor:
        """Approximate logits of every token, fp32 [rows, H, N]; -inf where a token does not count."""

    @abstractmethod
    def keys(self, start: int, stop: int) -> Tensor:
        """Restored keys of tokens start .. stop - 1, fp32 [rows, stop - start, D]; anything finite for padding."""

    def weigh(self, logits: Tensor) -> Partial:
        """Attention with logits [rows, H, N] over the restored keys of all tokens: a partial [rows, H] of mean keys
        (anything finite where no token is left)."""
        return Partial.weigh(logits, self.keys(0, self.span))

    @property
    @abstractmethod
    def index_bytes(self) -> int:
        """Bytes that scoring all tokens reads."""

    @property
    def resident_bytes(self) -> int:
        """Bytes kept for ``device``, room for what comes among them; of those ``streamed_bytes`` in host memory."""
        return self.index_bytes

    @property
    def streamed_bytes(self) -> int:
        """Bytes of what is streamed; 0 where nothing is."""
        return 0


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """``soft_cap`` that leaves what does not count at -inf."""
    return logits if softcap is None else soft_cap(logits, softcap).masked_fill(logits.isneginf(), -torch.inf)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    same_memory = a.data_ptr() == b.data_ptr() and a.stride() == b.stride()
    return same_memory or (a.device.type == "cpu" and torch.equal(a, b))  # two copies of one in another memory


class Padding(Rowwise):
    """How many tokens at the front of each row do not count, learnt from the pages."""

    row_state = ("_missing",)

    def __init__(self) -> None:
        self._missing: Tensor | None = None  # int64 [rows, 1, 1]

    def absorb(self, pages: Pages) -> None:
        if pages.valid is not None:
            missing = (~pages.valid).sum((1, 2))[:, None, None]
            self._missing = missing if self._missing is None else self._missing.add_(missing)  # stays where it is

    @property
    def missing(self) -> Tensor | None:
        """How many tokens that is, int64 [rows]; None where all of them count."""
        return None if self._missing is None else self._missing.flatten()

    def valid(self, n_tokens: int) -> Tensor | None:
        """Which of the first ``n_tokens`` tokens count, bool [rows, 1, n]; None when all do."""
        if self._missing is None:
            return None
        return torch.arange(n_tokens, device=self._missing.device) >= self._missing

    def mask(self, logits: Tensor) -> Tensor:
        """Logits [rows, H, N] with -inf at padding."""
        valid = self.valid(logits.shape[-1])
        return logits if valid is None else logits.masked_fill(~valid, -torch.inf)
