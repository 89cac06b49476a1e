"""Keys at 1, 2 or 4 bits a channel, per channel in groups of consecutive tokens (KIVI, arXiv:2402.02750, section 3)."""

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from kvoffload_kernels.dispatch import attend_quantized_index, fuses_quantized, score_quantized_pages
from kvoffload_kernels.page_scores.reference import quantise, restore, score_tokens
from torch import Tensor

from kvoffload.buffers import Growing, Room, tensor_bytes
from kvoffload.index.base import KeyIndex, Padding
from kvoffload.values import KeySample, Pages, Partial


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
        self.n_tokens, self.room = 0, None

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
        return self._padding.mask(score_tokens(query, *self._groups(), self._bits)[..., : self.span])

    def _fuses(self, query: Tensor, page_size: int) -> bool:
        return fuses_quantized(query, self._codes.view, page_size)

    def _fused_pages(self, query: Tensor, page_size: int) -> Tensor:
        missing = self._padding.missing
        return score_quantized_pages(
            query, *self._groups(), self._bits, n_tokens=self.span, page_size=page_size, missing=missing
        )

    def _fused_attention(self, query: Tensor, excluded: Tensor, page_size: int, softcap: float | None) -> Partial:
        return Partial(
            *attend_quantized_index(
                query, *self._groups(), self._bits, excluded=excluded, page_size=page_size,
                missing=self._padding.missing, softcap=softcap,
            )
        )  # fmt: skip

    @property
    def can_hold(self) -> bool:
        return self.n_tokens > 0

    def hold(self, room: Room | None) -> None:
        super().hold(room)
        for buffer in (self._codes, self._zero, self._step):
            buffer.hold(None if room is None else -(-room.n_tokens // self._group))

    def keys(self, start: int, stop: int) -> Tensor:
        first = start // self._group
        groups = slice(first, -(-stop // self._group))
        restored = restore(
            self._codes.view[:, groups], self._zero.view[:, groups], self._step.view[:, groups], self._bits
        )
        return restored.flatten(1, 2)[:, start - first * self._group : stop - first * self._group]

    def _groups(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._codes.view, self._zero.view, self._step.view

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
