"""Guessing a layer's queries while the layer before it computes (attention/ahead.py says what for).

What is known of the layer's input by then, the residual stream behind the attention before it, goes through the layer's
own norm and attention module up to the moment when that has its queries: so whatever the model does to make them
(biases, norms, rotary embeddings) is in the guess, without being known here.
"""

import threading
from itertools import pairwise
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvoffload.models.compiled import run
from kvoffload.models.joined import queries_alone
from kvoffload.models.tagged import AttendingLayer
from kvoffload.values import Partial

_WATCHED: WeakSet[nn.Module] = WeakSet()


class _Asked(Exception):  # noqa: N818 - no error
    """An attention module has its queries [B, H, Q, D]."""

    def __init__(self, query: Tensor) -> None:
        super().__init__()
        self.query = query


class _Probe(AttendingLayer):
    """A cache, and its only layer, that ends an attention module's forward when it has its queries."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.tag(key_states), value_states

    def attend(self, query: Tensor, *args: Any, **kwargs: Any) -> Partial:
        raise _Asked(query)

    def get_seq_length(self) -> int:
        return 0


def watch_layers(model: nn.Module) -> None:
    """From now on decoder layers tell caches that look ahead what they have; once for a model."""
    layers = [layer for layer in model.modules() if _attention(layer) is not None]
    for layer, following in pairwise(layers):
        if _attention(following).layer_idx == _attention(layer).layer_idx + 1 and layer not in _WATCHED:
            _WATCHED.add(layer)
            _Watch(layer, following)


class _Now(threading.local):
    """What a layer was called with by this thread: hidden states [B, Q, E], and by name."""

    given: tuple[Tensor, dict[str, Any]] | None = None


class _Watch:
    """What a layer is called with, and what its attention adds to that, for the layer that follows it. In models whose
    attention is added otherwise than to the input itself, the input has to do."""

    def __init__(self, layer: nn.Module, following: nn.Module) -> None:
        self._attention, self._norm = _attention(following), getattr(following, "input_layernorm", nn.Identity())
        self._index: int = self._attention.layer_idx
        self._factor: float = getattr(layer, "residual_multiplier", 1)
        self._now = _Now()
        projection = getattr(_attention(layer), "o_proj", None) if _adds_attention(layer) else None
        layer.register_forward_pre_hook(self._begin, with_kwargs=True)
        if projection is None:
            layer.register_forward_pre_hook(lambda *_: self._guess(None))
        else:
            projection.register_forward_hook(lambda _, args, output: self._guess(output))

    def _begin(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._now.given = (args[0] if args else kwargs["hidden_states"]), kwargs

    def _guess(self, attended: Tensor | None) -> None:
        given, self._now.given = self._now.given, None
        cache = None if given is None else given[1].get("past_key_values")
        if given is None or not isinstance(cache, Cache):
            return
        own, following = cache.layers[self._index - 1 : self._index + 1]
        if not (isinstance(own, AttendingLayer) and isinstance(following, AttendingLayer)):
            return  # other rotations, and nothing to move slices beside
        if following.looks_ahead(given[0].shape[1]):
            following.look_ahead(lambda: self._queries(self._stream(given[0], attended), given[1]))

    def _stream(self, hidden: Tensor, attended: Tensor | None) -> Tensor:
        if attended is None:
            return hidden
        return hidden + (attended if self._factor == 1 else attended * self._factor)

    def _queries(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        given = kwargs | {"hidden_states": run(self._norm, hidden), "past_key_values": _Probe()}
        try:
            with queries_alone(self._attention):
                self._attention(**given)
        except _Asked as asked:
            return asked.query
        raise AssertionError("an attention module that asks no cache has none of its layers in it")


def _adds_attention(layer: nn.Module) -> bool:
    """Whether a layer adds what its attention gives to its input, before anything else."""
    norms = {name for name, child in layer.named_children() if name.endswith("norm")}
    return norms == {"input_layernorm", "post_attention_layernorm"}


def _attention(layer: nn.Module) -> Any:
    """The attention module of a decoder layer; None for other modules."""
    named = (child for child in layer.children() if type(child).__name__.endswith("Attention"))
    return next((child for child in named if hasattr(child, "layer_idx")), None)
