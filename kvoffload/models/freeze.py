"""Early Token Freezing in prefill (PrHS, arXiv:2602.08329): from a layer on, a growing part of the oldest tokens is not
updated any more.

The first of two readings of the paper: ``hidden`` freezes hidden states, from which later layers still project keys and
values of their own. ``kv`` shares the keys and values of the first layer: an early token has them in all later layers.
Both change the result of a prefill; neither saves work in this reference, which computes all tokens and puts the
frozen ones back. Only ``kv`` could save bytes; pages are stored once a layer here all the same.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from kvoffload.policies.base import Depth, Freezing
from kvoffload.policies.prhs import first_position


@contextmanager
def frozen_states(model: Any, freezing: Freezing | None, n_before: int) -> Iterator[None]:
    """Inside this block a forward behind ``n_before`` tokens leaves the hidden states of early tokens as they are from
    the first layer on."""
    with ExitStack() as hooks:
        if freezing is not None and freezing.what == "hidden":
            layers = model.get_decoder().layers
            for place, layer in enumerate(layers):
                hook = _KeepEarly(freezing, Depth(place, len(layers)), n_before)
                hooks.enter_context(_removed(layer.register_forward_hook(hook, with_kwargs=True)))
        yield


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


class _KeepEarly:
    """A forward hook on a decoder layer: hidden states [B, n, C] of frozen tokens are its input's."""

    def __init__(self, freezing: Freezing, depth: Depth, n_before: int) -> None:
        self._freezing, self._depth, self._n_before = freezing, depth, n_before

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        n_frozen = n_frozen_tokens(self._freezing, self._depth, self._n_before, hidden.shape[1])
        if n_frozen == 0:
            return output
        new = output[0] if isinstance(output, tuple) else output
        kept = torch.cat([hidden[:, :n_frozen], new[:, n_frozen:]], 1)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept


def n_frozen_tokens(freezing: Freezing, depth: Depth, n_before: int, n_new: int) -> int:
    """How many of a chunk's first tokens are frozen in a layer: those below E(t), t the tokens up to its end."""
    end = n_before + n_new
    first = first_position(depth, end, start=freezing.start, keep=freezing.keep, power=freezing.power)
    return min(max(first - n_before, 0), n_new)


class SharedKv:
    """The keys and values of the first layer for one chunk, [rows, n, D] and [rows, n, Dv]."""

    def __init__(self, freezing: Freezing) -> None:
        self._freezing = freezing
        self._first: tuple[Tensor, Tensor] | None = None

    def share(self, depth: Depth, n_before: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values with those of the first layer where tokens are frozen."""
        if depth.place + 1 == self._freezing.start:
            self._first = keys, values
        n_frozen = n_frozen_tokens(self._freezing, depth, n_before, keys.shape[1])
        if n_frozen == 0 or self._first is None:
            return keys, values
        first_keys, first_values = (t[:, :n_frozen] for t in self._first)
        return torch.cat([first_keys, keys[:, n_frozen:]], 1), torch.cat([first_values, values[:, n_frozen:]], 1)
