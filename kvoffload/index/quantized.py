"""Keys at 1, 2 or 4 bits a channel, per channel in groups of consecutive tokens (KIVI, arXiv:2402.02750, section 3)."""

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from kvoffload_kernels.page_scores.reference import quantise, restore, score_tokens
from torch import Tensor

from kvoffload.buffers import Growing, tensor_bytes
from kvoffload.index.base import KeyIndex, Padding
from kvoffload.values import KeySample, Pages


class QuantizedIndex(KeyIndex):
    """Groups of tokens are closed as they fill; the open one (less than a group) is also kept as it is and quantised
    anew with every page, so that its tokens are in the index too."""

    def __init__(self, bits: int, group: int, device: torch.device) -> None:
        self.device = device
        self._bits, self._group = bits, group
        self.reset()

    def reset(self, sample: KeySample | None = None) -> None:
        self._codes, self._zero, self._step = Growing(), Growing(), Growing()
        self._open_keys: Tensor | None = None  # tokens of the group that is not full yet, [rows, T, D]
        self._open_valid: Tensor | None = None
        self._padding = Padding()
        self.n_tokens = 0

    def absorb(self, pages: Pages) -> None:
        pages = pages.to(self.device)
        self._padding.absorb(pages)
        keys = pages.keys.flatten(1, 2)
        valid = torch.ones_like(keys[..., 0], dtype=torch.bool) if pages.valid is None else pages.valid.flatten(1, 2)
        self.n_tokens += keys.shape[1]
        if self._open_keys is not None and self._open_valid is not None:
            keys, valid = torch.cat([self._open_keys, keys], 1), torch.cat([self._open_valid, valid], 1)
            for buffer in (self._codes, self._zero, self._step):
                buffer.truncate(len(buffer) - 1)
        closed = keys.shape[1] // self._group * self._group
        self._quantise(keys[:, :closed], valid[:, :closed])
        self._set_open(keys[:, closed:], valid[:, closed:])

    def logits(self, query: Tensor) -> Tensor:
        logits = score_tokens(query, self._codes.view, self._zero.view, self._step.view, self._bits)
        return self._padding.mask(logits[..., : self.n_tokens])

    def keys(self, start: int, stop: int) -> Tensor:
        first = start // self._group
        groups = slice(first, -(-stop // self._group))
        restored = restore(
            self._codes.view[:, groups], self._zero.view[:, groups], self._step.view[:, groups], self._bits
        )
        return restored.flatten(1, 2)[:, start - first * self._group : stop - first * self._group]

    @property
    def index_bytes(self) -> int:
        return self._codes.used_bytes + self._zero.used_bytes + self._step.used_bytes

    @property
    def resident_bytes(self) -> int:
        return self.index_bytes + (0 if self._open_keys is None else tensor_bytes(self._open_keys))

    def _set_open(self, keys: Tensor, valid: Tensor) -> None:
        n_tokens = keys.shape[1]
        self._open_keys, self._open_valid = (keys.clone(), valid.clone()) if n_tokens else (None, None)
        if n_tokens:
            missing = (0, self._group - n_tokens)
            self._quantise(F.pad(keys, (0, 0, *missing)), F.pad(valid, missing))

    def _quantise(self, keys: Tensor, valid: Tensor) -> None:
        groups = (-1, self._group)
        parts = quantise(keys.unflatten(1, groups), valid.unflatten(1, groups), self._bits)
        for buffer, part in zip((self._codes, self._zero, self._step), parts, strict=True):
            buffer.append(part)
