"""The layers of a cache that another pipeline stage runs: they only know how long the sequence is."""

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvoffload.errors import UnsupportedModelError


class LayerElsewhere(CacheLayerMixin):
    """What transformers asks of the first layer, wherever it runs, is answered by the stage's own first one."""

    is_sliding, is_compileable, is_croppable, supports_early_init = False, False, True, False

    def __init__(self, own: Callable[[], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = own
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return int(self._own().get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Another stage's to do."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing here."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("another pipeline stage runs this layer")


def keep_stage(layers: list[Any], unbounded: list[int], owned: range | None, model_type: str) -> list[int]:
    """Leave all layers but the owned ones to other stages (None: there are none); the numbers of those that stay.
    Raises UnsupportedModelError for layers of other kinds: their masks are made from the first of them, which may be
    elsewhere."""
    if owned is None:
        return unbounded
    own = [i for i in unbounded if i in owned]
    if len(unbounded) < len(layers):
        raise UnsupportedModelError(f"{model_type}: pipeline stages need layers that all grow with the context")
    for i in set(unbounded) - set(own):
        layers[i] = LayerElsewhere(lambda: layers[own[0]])
    return own
