"""How the attention function finds the cache layer that its keys came through."""

from abc import abstractmethod
from collections.abc import Callable
from contextvars import ContextVar

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvoffload.values import Partial

_UPDATED: ContextVar["AttendingLayer | None"] = ContextVar("updated layer", default=None)


class AttendingLayer(CacheLayerMixin):
    """A cache layer that does the attention itself: its ``update`` gives the new keys and values back, tagged."""

    is_sliding, is_compileable, is_croppable, supports_early_init = False, False, False, False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True

    def tag(self, keys: Tensor) -> Tensor:
        """A view of the keys that ``of`` knows."""
        _UPDATED.set(self)
        keys = keys.view_as(keys)
        keys._kvoffload_layer = self  # type: ignore[attr-defined]
        return keys

    @staticmethod
    def of(key: Tensor) -> "AttendingLayer | None":
        """The layer whose ``update`` gave these keys, or was called last where the model rebuilt them since (MLA)."""
        tagged: AttendingLayer | None = getattr(key, "_kvoffload_layer", None)
        updated = _UPDATED.get()
        _UPDATED.set(None)
        return tagged or updated

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None
    ) -> Partial:
        """Append the new tokens and attend: query [B, H, Q, D], key [B, G, Q, D] to a partial [rows, R, Q, Dv]."""

    def is_open(self) -> bool:
        """Whether nothing comes before the next tokens, so that causal attention over them alone is exact, and
        ``open_with`` takes them in."""
        return False

    def open_with(self, query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> None:
        """Append the first tokens, whose attention was asked for elsewhere; shapes as in ``attend``."""
        raise NotImplementedError

    def looks_ahead(self, n_tokens: int) -> bool:
        """Whether a guess of the next queries is wanted in a forward of so many tokens."""
        return False

    def look_ahead(self, guess: Callable[[], Tensor]) -> None:
        """Choose pages by a guess of the next queries [B, H, Q, D]."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do before attention runs."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1
