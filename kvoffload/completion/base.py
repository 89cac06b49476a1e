"""The contract of a completion: a summary of every sealed page that estimates the attention to those that were not
fetched."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from kvoffload_kernels.completion.reference import Tilt
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kvoffload.buffers import Room
from kvoffload.completion.calibrated import CalibrationFile
from kvoffload.geometry import Geometry
from kvoffload.index.base import KeyIndex
from kvoffload.rows import Rowwise
from kvoffload.values import Fetched, Pages, Partial, Parts


def per_query(state: Tensor, query: Tensor) -> Tensor:
    """State [rows, ...] repeated for the queries [rows * Q, ...] of each row; the state itself where Q = 1."""
    n_queries = query.shape[0] // state.shape[0]
    return state if n_queries == 1 else state.repeat_interleave(n_queries, 0)


class Completion(Rowwise, ABC):
    """The remainder of one layer. Pages come in order, each once; queries are fp32 [rows * Q, R, D], already scaled:
    the Q queries of row g are g * Q .. g * Q + Q - 1 ("query rows"; Q = 1 when generating)."""

    uses_scores: bool = False
    """Whether ``estimate`` looks at the scores, or at the index they come from; the meter then charges it for the index
    too."""

    index: KeyIndex | None = None
    """The selector's index where it has one, set before the first page comes; a page is in it when it comes here."""

    uses_anchor: bool = False
    """Whether the state depends on the anchor; it is then rebuilt around newer queries while generating."""

    reads_slices: bool = True
    """Whether ``estimate_parts`` looks into the slices, and not only at which they are and at their ``sums``."""

    @property
    def tilt(self) -> Tilt | None:
        """What ``estimate_parts`` is given the slices' sums under, if anything."""
        return None

    @abstractmethod
    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        """Forget every page; ``anchor`` is the prefill's mean scaled query, fp32 [rows, D], ``n_pages`` how many come
        now."""

    @abstractmethod
    def absorb(self, pages: Pages) -> None:
        """Take in the next sealed pages; the tensors are not kept."""

    def refresh(self) -> None:
        """What an estimate does about the pages so far before it answers; one that is restored repeats it."""

    @abstractmethod
    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        """The absorbed pages minus the fetched ones, as a partial [rows * Q, R]; lse = -inf where nothing remains
        (exactly so when every page was fetched). ``fetched`` holds each slice of a query row at most once and changes
        nothing in the state. ``scores`` fp32 [rows * Q, R, P] are the selector's estimates of all pages' log masses; on
        the query's device only where ``uses_scores`` says that they are needed."""

    def estimate_parts(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Parts | None:
        """The same for steps of fixed shapes, one query a row, in parts that are merged at the end of the step, their
        outputs anything finite where lse = -inf; None where nothing stands for what was not fetched."""
        return Parts.of(self.estimate(query, fetched, scores))

    @property
    def can_hold(self) -> bool:
        """Whether an estimate may be part of steps of fixed shapes: it reads only tensors that pages and ``refresh``
        change in place, scores and index held in room, and right after a ``refresh`` does nothing else."""
        return False

    def hold(self, room: Room | None) -> None:
        """From now on what there is of each token stays where it is while pages come into the room, in which scores and
        index are held too, each by ``note`` and ``put``; None ends that."""

    def note(self) -> None:
        """The host's part of an ``absorb`` of one page while held: count it, and make place for it. Comes before
        ``put``."""

    def put(self, page: Pages) -> None:
        """The device's part: the same work on the same tensors for every page, so that it can be replayed; it is the
        ``newest`` of the room, and in the index already."""
        raise NotImplementedError

    @property
    def n_clamped(self) -> int:
        """Entries of the summary that were kept from exploding, and are less exact for that."""
        return 0

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of the summary, all of them touched in each step."""

    @property
    def resident_bytes(self) -> int:
        """Bytes kept on the device; more than the state where it is made of something."""
        return self.state_bytes


class CompletionConfigBase(BaseModel):
    """Fields of one kind of completion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs_index: ClassVar[bool] = False
    """Whether it reads the selector's token-level index, which there must be then."""

    holds: ClassVar[bool] = False
    """Whether the completion built can be in steps of fixed shapes (``Completion.can_hold``) when a prompt is in."""

    @property
    def calibration(self) -> CalibrationFile | None:
        """The file that fits this completion to one model, which it then cannot do without."""
        return None

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        raise NotImplementedError

    def resident_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        """Device bytes of one kv head with what the summary is made of."""
        return self.index_bytes(n_tokens, key_dim, value_dim, page_size, itemsize)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        """Bytes that the summary of ``n_tokens`` tokens of one kv head takes, for plans made before a model is
        loaded."""
        raise NotImplementedError
