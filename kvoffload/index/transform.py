"""Transform-coded keys: rotated so that channels are uncorrelated and errors weigh as queries weigh them, then each
channel at 4, 2, 1 or 0 bits by its variance (transform coding: Goyal, IEEE SPM 18(5), 2001; kernels/README.md)."""

from dataclasses import dataclass

import torch
from kvoffload_kernels.dispatch import (
    attend_transform_index,
    decode_transform,
    fuses_transform,
    score_transform_pages,
)
from kvoffload_kernels.transform_code.reference import Levels, encode, fit, fit_levels, tier_widths
from torch import Tensor

from kvoffload.buffers import Growing, Room, tensor_bytes
from kvoffload.index.base import KeyIndex, Padding
from kvoffload.rows import Rowwise
from kvoffload.values import KeySample, Pages, Partial

FIT_TOKENS = 512
"""With a sample of fewer keys, or none, keys stay as they are until there are so many of them."""


@dataclass
class _Code(Rowwise):
    """A fitted transform: mean [rows, D] fp16, analysis fp32 and synthesis fp16 [rows, D, D'] with D' the channels that
    have bits, and their levels; scoring reads all but the analysis."""

    mean: Tensor
    analysis: Tensor
    synthesis: Tensor
    levels: Levels
    row_state = ("mean", "analysis", "synthesis", "levels")


class TransformIndex(KeyIndex):
    """Codes of all tokens under one transform, fitted to a sample of the prefill, or else to the first ``FIT_TOKENS``
    keys themselves."""

    row_state = ("_codes", "_padding", "_code")

    def __init__(self, bits: float, key_dim: int, device: torch.device) -> None:
        self.device = device
        self._widths = tier_widths(bits, key_dim)
        self.reset()

    def reset(self, sample: KeySample | None = None) -> None:
        self._raw, self._codes = Growing(), Growing(streamed=self.streamed)
        self._padding = Padding()
        enough = sample is not None and sample.keys.shape[1] >= FIT_TOKENS
        self._code = self._fit(sample) if sample is not None and enough else None
        self._decoded: Tensor | None = None  # from scoring to weighing, if the logits are handed on
        self.n_tokens, self.room = 0, None

    def absorb(self, pages: Pages) -> None:
        pages = pages.to(self.device)
        self._padding.absorb(pages)
        keys = pages.keys.flatten(1, 2)
        self.n_tokens += keys.shape[1]
        if self._code is None:
            self._raw.append(keys)
            if self.n_tokens < FIT_TOKENS:
                return
            keys, self._raw = self._raw.view, Growing()
            valid = self._padding.valid(FIT_TOKENS)
            self._code = self._fit(KeySample(keys[:, :FIT_TOKENS], None if valid is None else valid[:, 0]))
        self._codes.append(self._encoded(keys))

    def logits(self, query: Tensor) -> Tensor:
        if self._code is None:
            logits = query @ self._raw.view.float().transpose(-1, -2)
        else:
            turned = query @ self._code.synthesis.float()
            offset = query @ self._code.mean.float()[..., None]
            channels = decode_transform(self._codes.view, self._code.levels)
            self._decoded = channels if self.hands_on else None
            logits = turned @ channels.transpose(-1, -2) + offset
        return self._padding.mask(logits)

    def weigh(self, logits: Tensor) -> Partial:
        if self._code is None:
            return super().weigh(logits)
        channels, self._decoded = self._decoded, None
        if channels is None or channels.shape[1] != self.span:
            channels = decode_transform(self._codes.view, self._code.levels)
        mean = Partial.weigh(logits, channels)
        keys = mean.output @ self._code.synthesis.float().transpose(-1, -2) + self._code.mean.float()[:, None]
        return Partial(keys, mean.lse)

    def _fuses(self, query: Tensor, page_size: int) -> bool:
        return self._code is not None and fuses_transform(query, page_size)

    def _fused_pages(self, query: Tensor, page_size: int, newest: Tensor | None) -> Tensor:
        missing = self._padding.missing
        return score_transform_pages(query, *self._coded(), page_size=page_size, missing=missing, newest=newest)

    def _fused_attention(self, query: Tensor, excluded: Tensor, page_size: int, softcap: float | None) -> Partial:
        return Partial(
            *attend_transform_index(
                query, *self._coded(), excluded=excluded, page_size=page_size,
                missing=self._padding.missing, softcap=softcap,
            )
        )  # fmt: skip

    @property
    def can_hold(self) -> bool:
        return self._code is not None

    def hold(self, room: Room | None) -> None:
        super().hold(room)
        self._codes.hold(None if room is None else room.n_tokens)

    def note(self) -> None:
        assert self.room is not None, "a page is put while held"
        self.n_tokens += self.room.page_size
        self._codes.count(self.n_tokens)

    def put(self, page: Pages) -> None:
        assert self.room is not None, "a page is put while held"
        self._padding.absorb(page)
        self._codes.put(self.room.tokens, self._encoded(page.keys.flatten(1, 2)))

    def newest_keys(self) -> Tensor:
        assert self.room is not None, "a page is put while held"
        return self._restored(self._codes.take(self.room.tokens))

    def _coded(self) -> tuple[Tensor, Tensor, Tensor, Levels]:
        assert self._code is not None, "only coded keys are scored by their codes"
        return self._codes.view, self._code.mean, self._code.synthesis, self._code.levels

    def keys(self, start: int, stop: int) -> Tensor:
        if self._code is None:
            return self._raw.view[:, start:stop].float()
        return self._restored(self._codes.view[:, start:stop])

    @property
    def index_bytes(self) -> int:
        fitted = 0 if self._code is None else tensor_bytes(self._code.mean, self._code.synthesis, *self._code.levels)
        return self._raw.used_bytes + self._codes.used_bytes + fitted

    @property
    def resident_bytes(self) -> int:
        spare = sum(buffer.held_bytes - buffer.used_bytes for buffer in (self._raw, self._codes))
        return self.index_bytes + spare + (0 if self._code is None else tensor_bytes(self._code.analysis))

    @property
    def streamed_bytes(self) -> int:
        return self._codes.held_bytes if self.streamed else 0

    def _encoded(self, keys: Tensor) -> Tensor:
        """Codes uint8 [rows, n, bytes] of keys [rows, n, D]."""
        assert self._code is not None, "only a fitted transform encodes"
        return encode(keys, self._code.mean, self._code.analysis, self._code.levels)

    def _restored(self, codes: Tensor) -> Tensor:
        """Keys fp32 [rows, n, D] of codes [rows, n, bytes]."""
        assert self._code is not None, "only a fitted transform has codes"
        channels = decode_transform(codes, self._code.levels)
        return channels @ self._code.synthesis.float().transpose(-1, -2) + self._code.mean.float()[:, None]

    def _fit(self, sample: KeySample) -> _Code:
        sample = sample.to(self.device)
        mean, covariance = sample.moments()
        mean = mean.half()
        analysis, synthesis = (t[..., : sum(self._widths)].contiguous() for t in fit(covariance, sample.query_moment))
        channels = (sample.keys.float() - mean.float()[:, None]) @ analysis
        return _Code(mean, analysis, synthesis.half(), fit_levels(channels, sample.weights(), self._widths))
