"""The layers of a cache that another pipeline stage runs: they only know how long the sequence is."""

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor

from kvoffload.errors import UnsupportedModelError
from kvoffload.models.tagged import AttendingLayer


class LayerElsewhere(AttendingLayer):
    """What transformers asks of the first layer, wherever it runs, is answered by the stage's own first one."""

    is_croppable = True

    def __init__(self, own: Callable[[], Any]) -> None:
        super().__init__()
        self._own = own

    def get_seq_length(self) -> int:
        return int(self._own().get_seq_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Another stage's to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("another pipeline stage runs this layer")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> NoReturn:
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
