"""The KV of a prompt that nobody prefilled: the model's own for its first tokens, random after them with the same mean
and deviation in every channel, the same for every runtime that is measured on it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvoffload.attention.prefill import prepare
from kvoffload.models.cache import OffloadCache
from kvoffload.models.offload_layer import OffloadLayer
from kvoffload.models.stock import LayerKv, prompt_layers
from kvoffload.runtime.session import Session

_REAL_TOKENS = 256
_BLOCK_TOKENS = 8192


class PromptKv:
    """Of ``n_sequences`` sequences of any length up to memory; nothing of the random part is kept."""

    def __init__(self, model: Any, n_sequences: int, n_tokens: int) -> None:
        n_real = min(_REAL_TOKENS, n_tokens // 2)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        ids = torch.randint(vocabulary, (n_sequences, n_real), generator=torch.Generator().manual_seed(0))
        self.ids = ids.to(model.device)
        with torch.inference_mode():
            self._real = prompt_layers(model, self.ids, chunk=n_real)
            self._moments = [tuple(_moments(t) for t in kv) for kv in self._real]

    @property
    def n_real(self) -> int:
        return self.ids.shape[1]

    def random(self, layer: int, n_sequences: int, n_tokens: int) -> Iterator[LayerKv]:
        """What follows the real tokens up to ``n_tokens``, in blocks [B, G, n, D]."""
        for first in range(self.n_real, n_tokens, _BLOCK_TOKENS):
            n = min(_BLOCK_TOKENS, n_tokens - first)
            generator = torch.Generator(self.ids.device).manual_seed(layer << 32 | first)
            keys, values = (
                self._draw(*moments, n, like, generator)[:n_sequences]
                for moments, like in zip(self._moments[layer], self._real[layer], strict=True)
            )
            yield keys, values

    def layers(self, n_sequences: int, n_tokens: int) -> Iterator[LayerKv]:
        """Layer by layer, all of the first ``n_tokens`` tokens [B, G, N, D]."""
        for layer, real in enumerate(self._real):
            blocks = [tuple(t[:n_sequences] for t in real), *self.random(layer, n_sequences, n_tokens)]
            keys, values = (torch.cat(parts, 2) for parts in zip(*blocks, strict=True))
            yield keys, values

    @torch.inference_mode()
    def fill(self, cache: OffloadCache, n_sequences: int, n_tokens: int) -> None:
        """Give a cache of ours that has the real tokens the others up to ``n_tokens``, and summarise all of them as
        after any prefill."""
        for i, layer in enumerate(cache.layers):
            assert isinstance(layer, OffloadLayer), "prompt_layers refuses bounded layers"
            extend(layer, self.random(i, n_sequences, n_tokens))

    def fill_session(self, session: Session, n_tokens: int) -> None:
        """The same for an empty session; its text is zeros after the real tokens."""
        session.prefill(self.ids[0])
        self.fill(session.cache, 1, n_tokens)
        session.token_ids += [0] * (n_tokens - len(session.token_ids))

    @staticmethod
    def _draw(mean: Tensor, deviation: Tensor, n: int, like: Tensor, generator: torch.Generator) -> Tensor:
        shape = (*like.shape[:2], n, like.shape[3])
        noise = torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)
        return noise.mul_(deviation).add_(mean)


def extend(layer: OffloadLayer, blocks: Iterable[LayerKv]) -> None:
    """Give a layer that has the beginning of its prompt the rest, and summarise all of it as after any prefill."""
    assert layer.kv is not None, "its prefill was just made"
    layer.kv.ready = False
    for keys, values in blocks:
        layer.kv.append(keys.flatten(0, 1), values.flatten(0, 1))
        layer.n_seen += keys.shape[2]
    prepare(layer.kv)


def _moments(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation over the tokens of [B, G, N, D], in its dtype."""
    return tensor.float().mean(2, keepdim=True).to(tensor.dtype), tensor.float().std(2, keepdim=True).to(tensor.dtype)
