"""The contract of a completion: a summary of every sealed page that estimates the attention to those that were not
fetched."""

from abc import ABC, abstractmethod

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial


class Completion(ABC):
    """The remainder of one layer. Pages come in order, each once; queries are fp32 [rows, R, D], already scaled."""

    @abstractmethod
    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        """Forget every page; ``anchor`` is the prefill's mean scaled query, fp32 [rows, D], ``n_pages`` how many come
        now."""

    @abstractmethod
    def absorb(self, pages: Pages) -> None:
        """Take in the next sealed pages; the tensors are not kept."""

    @abstractmethod
    def estimate(self, query: Tensor, fetched: Fetched) -> Partial:
        """The absorbed pages minus the fetched ones, as a partial [rows, R]; lse = -inf where nothing remains
        (exactly so when every page was fetched). ``fetched`` holds each slice at most once and changes nothing in the
        state."""

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of the summary, all of them touched in each step."""


class CompletionConfigBase(BaseModel):
    """Fields of one kind of completion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        raise NotImplementedError

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        """Bytes that the summary of ``n_tokens`` tokens of one kv head takes, for plans made before a model is
        loaded."""
        raise NotImplementedError
