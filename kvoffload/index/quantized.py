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
    anew with every page, so that its tokens are in the index too. Statistics leave out what does not count."""

    row_state = ("_codes", "_zero", "_step", "_open", "_padding")

    def __init__(self, bits: int, group: int, device: torch.device) -> None:
        self.device = device
        self._bits, self._group = bits, group
        self.reset()

    def reset(self, sample: KeySample | None = None) -> None:
        self._codes, self._zero, self._step = (Growing(streamed=self.streamed) for _ in range(3))
        self._open: Tensor | None = None  # [rows, T, D]; in front the tokens of the group that is not full yet
        self._padding = Padding()
        self.n_tokens, self.room = 0, None

    def absorb(self, pages: Pages) -> None:
        pages = pages.to(self.device)
        self._padding.absorb(pages)
        keys, n_open = pages.keys.flatten(1, 2), self.n_tokens % self._group
        first, self.n_tokens = self.n_tokens - n_open, self.n_tokens + keys.shape[1]
        if self._open is not None and n_open:
            keys = torch.cat([self._open[:, :n_open], keys], 1)
            for buffer in self._buffers:
                buffer.truncate(first // self._group)
        n_closed = keys.shape[1] // self._group * self._group
        self._open = F.pad(keys[:, n_closed:], (0, 0, 0, self._group - keys.shape[1] + n_closed))
        if n_closed:
            self._append(keys[:, :n_closed], first)
        if n_closed < keys.shape[1]:
            self._append(self._open, first + n_closed)

    def logits(self, query: Tensor) -> Tensor:
        return self._padding.mask(score_tokens(query, *self._groups(), self._bits)[..., : self.span])

    def _fuses(self, query: Tensor, page_size: int) -> bool:
        return fuses_quantized(query, self._codes.view, page_size)

    def _fused_pages(self, query: Tensor, page_size: int, newest: Tensor | None) -> Tensor:
        return score_quantized_pages(
            query, *self._groups(), self._bits, n_tokens=self.span, page_size=page_size,
            missing=self._padding.missing, newest=newest,
        )  # fmt: skip

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
        for buffer in self._buffers:
            buffer.hold(None if room is None else -(-room.n_tokens // self._group))

    def note(self) -> None:
        assert self.room is not None, "a page is put while held"
        self.n_tokens += self.room.page_size
        for buffer in self._buffers:
            buffer.count(-(-self.n_tokens // self._group))

    def put(self, page: Pages) -> None:
        assert self.room is not None, "a page is put while held"
        assert self._open is not None, "held with pages"
        self._padding.absorb(page)
        self._open.index_copy_(1, self.room.tokens % self._group, page.keys.flatten(1, 2))
        group = self._newest_group()
        tokens = group * self._group + torch.arange(self._group, device=self.device)
        parts = self._quantised(self._open, self._valid(tokens, tokens <= self.room.tokens[-1]))
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.put(group, part)

    def newest_keys(self) -> Tensor:
        assert self.room is not None, "a page is put while held"
        group = self._newest_group()
        codes, zero, step = (buffer.take(group) for buffer in self._buffers)
        restored = restore(codes, zero, step, self._bits)
        return restored.flatten(1, 2).index_select(1, self.room.tokens % self._group)

    def _newest_group(self) -> Tensor:
        """The group of the room's newest page, int64 [1]."""
        assert self.room is not None, "a page is put while held"
        return self.room.tokens[:1] // self._group

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
        held = sum(buffer.held_bytes for buffer in self._buffers)
        return held + (0 if self._open is None else tensor_bytes(self._open))

    @property
    def streamed_bytes(self) -> int:
        return sum(buffer.held_bytes for buffer in self._buffers) if self.streamed else 0

    @property
    def _buffers(self) -> tuple[Growing, Growing, Growing]:
        return self._codes, self._zero, self._step

    def _append(self, keys: Tensor, first: int) -> None:
        """Quantise whole groups [rows, n * T, D] of tokens from ``first`` on, of which those up to ``n_tokens`` are."""
        tokens = torch.arange(first, first + keys.shape[1], device=self.device)
        parts = self._quantised(keys, self._valid(tokens, tokens < self.n_tokens))
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.append(part)

    def _valid(self, tokens: Tensor, known: Tensor) -> Tensor:
        """Which of these tokens, int64 [n], are ``known``, bool [n], and no padding: bool [rows or 1, n]."""
        missing = self._padding.missing
        return known[None] if missing is None else known & (tokens >= missing[:, None])

    def _quantised(self, keys: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = (-1, self._group)
        return quantise(keys.unflatten(1, groups), valid.unflatten(1, groups), self._bits)
