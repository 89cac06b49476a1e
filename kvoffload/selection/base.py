"""The contract of a selector: it keeps something of every sealed page and estimates each page's log mass for a
query."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kvoffload.buffers import Room
from kvoffload.geometry import Geometry
from kvoffload.index.base import KeyIndex
from kvoffload.rows import Rowwise
from kvoffload.values import KeySample, Pages


class Selector(Rowwise, ABC):
    """Page scores of one layer. Pages come in order, each once; queries are fp32 [rows, R, D], already scaled."""

    device: torch.device
    """Where the index lives and is scored; queries are given there."""

    uses_anchor: bool = False
    """Whether the index depends on the anchor; it is then rebuilt around newer queries while generating."""

    uses_sample: bool = False
    """Whether ``fit`` does anything."""

    index: KeyIndex | None = None
    """The approximate keys that the scores come from, where there are any; completions may read them."""

    def reset(self, anchor: Tensor) -> None:
        """Forget every page; ``anchor`` is the prefill's mean scaled query, fp32 [rows, D]."""

    def fit(self, sample: KeySample) -> None:
        """Some of the keys that come, right after a reset and before the first page."""

    @abstractmethod
    def absorb(self, pages: Pages) -> None:
        """Take in the next sealed pages; the tensors are not kept."""

    @abstractmethod
    def score(self, query: Tensor) -> Tensor:
        """Log mass of every page as estimated from the index, fp32 [rows, R, P]; called only when P > 0."""

    @property
    def can_hold(self) -> bool:
        """Whether ``hold`` may be called now."""
        return False

    def hold(self, room: Room | None) -> None:
        """From now on ``score`` gives ``room.n_pages`` scores, -inf where no page is, and reads tensors that stay where
        they are while pages come into the room, each by ``note`` and ``put``; None ends that, as a reset does."""
        raise NotImplementedError

    def note(self) -> None:
        """The host's part of an ``absorb`` of one page while held: count it. Comes before ``put``."""
        raise NotImplementedError

    def put(self, page: Pages) -> None:
        """The device's part: the same work on the same tensors for every page, so that it can be replayed; it is the
        ``newest`` of the room, whose places say where it goes."""
        raise NotImplementedError

    @property
    @abstractmethod
    def index_bytes(self) -> int:
        """Bytes of the index, all of them read in each step."""

    @property
    def resident_bytes(self) -> int:
        """Bytes that the selector keeps on ``device``."""
        return self.index_bytes


class SelectorConfigBase(BaseModel):
    """Fields of one kind of selector."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reads_slow_tier: ClassVar[bool] = False
    """Whether scoring reads KV bytes themselves: they stay in host memory, and every step is charged them as read."""

    has_index: ClassVar[bool] = False
    """Whether the selector built has a token-level index for completions to read."""

    holds: ClassVar[bool] = False
    """Whether the selector built can be held (``Selector.can_hold``) when a prompt is in."""

    def build(self, geometry: Geometry, device: torch.device) -> Selector:
        raise NotImplementedError

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        """Bytes that the index keeps of ``n_tokens`` tokens of one kv head, for plans made before a model is loaded."""
        raise NotImplementedError
