"""``sketch``: as ``regression``, with a few bits of every value beside its key (kernels/README.md, "Regressed values").

What a first fit leaves of a value is transform-coded; values are then regressed on restored keys and restored rests
together. The codes grow with the context, and every step is charged for all of them.
"""

from typing import ClassVar, Literal

import torch
from kvoffload_kernels.page_scores.reference import mask_pages
from kvoffload_kernels.transform_code.reference import code_bytes, n_levels, tier_widths
from pydantic import field_validator
from torch import Tensor

from kvoffload.buffers import Growing, Room, tensor_bytes
from kvoffload.completion.base import Completion
from kvoffload.completion.regression import (
    RegressionCompletion,
    RegressionConfigBase,
    least_squares,
    moment_bytes,
)
from kvoffload.geometry import Geometry
from kvoffload.index.base import capped
from kvoffload.index.transform import TransformIndex
from kvoffload.values import Fetched, KeySample, Pages, Partial

FIT_TOKENS = 2048
"""The first fit and the transform are made of exactly so many tokens, in whatever runs they come."""


class SketchCompletionConfig(RegressionConfigBase):
    """Values at ``bits`` bits a channel on average."""

    kind: Literal["sketch"] = "sketch"
    holds: ClassVar[bool] = True
    bits: float = 1.0

    @field_validator("bits")
    @classmethod
    def _known(cls, bits: float) -> float:
        tier_widths(bits, 8)
        return bits

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return SketchCompletion(self.bits, self.ridge, geometry, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        affine = (key_dim + value_dim + 1) * value_dim * 4
        if n_tokens < FIT_TOKENS:
            return n_tokens * value_dim * itemsize + affine
        widths = tier_widths(self.bits, value_dim)
        code = n_tokens * code_bytes(widths) + 2 * value_dim * (sum(widths) + 1) + 2 * n_levels(widths)
        return code + affine

    def resident_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        state = self.index_bytes(n_tokens, key_dim, value_dim, page_size, itemsize)
        state += moment_bytes(key_dim + value_dim, value_dim)
        if n_tokens < FIT_TOKENS:
            return state
        analysis = value_dim * sum(tier_widths(self.bits, value_dim))
        return state + ((key_dim + 1) * value_dim + key_dim + analysis) * 4


class SketchCompletion(RegressionCompletion):
    """The first ``FIT_TOKENS`` tokens wait, with their values as they are, for the fit that the codes need. Codes lie
    on the index's device."""

    row_state = (*RegressionCompletion.row_state, "_first_map", "_first_centre", "_rests")

    def __init__(self, bits: float, ridge: float, geometry: Geometry, device: torch.device) -> None:
        self._bits = bits
        super().__init__(ridge, geometry, device)

    @property
    def _n_features(self) -> int:
        return self._geometry.key_dim + self._geometry.value_dim

    def _mean_features(self, query: Tensor, fetched: Fetched) -> Partial:
        assert self._rests is not None, "values are still waiting"
        assert self.index is not None, "built without an index"
        logits = self._logits(query, fetched)
        keys, rests = self.index.weigh(logits), self._rests.weigh(logits)
        return Partial(torch.cat([keys.output, rests.output], -1), keys.lse)

    def _logits(self, query: Tensor, fetched: Fetched) -> Tensor:
        """The index's logits for scaled queries [rows * Q, R, D], -inf at what was fetched: fp32 [rows, Q * R, N]."""
        assert self.index is not None, "built without an index"
        asked, read = self._asked(query, fetched)
        if self.index.room is not None:
            read = read | self.index.room.beyond
        logits = capped(self.index.logits_again(asked), self._geometry.softcap)
        return mask_pages(logits, read, self._geometry.page_size)

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        super().reset(anchor, n_pages=n_pages)
        if self.index is not None:
            self.index.needs_logits = True
        self._waiting, self._waiting_valid = Growing(), Growing()
        self._first_map, self._first_centre = torch.zeros(0), torch.zeros(0)
        self._rests: TransformIndex | None = None

    def absorb(self, pages: Pages) -> None:
        if self._rests is not None:
            self._code(pages.values.flatten(1, 2).float(), pages.log_valid().flatten(1))
            return
        self._waiting.append(pages.values.flatten(1, 2))
        self._waiting_valid.append(pages.log_valid().flatten(1))
        if len(self._waiting) >= FIT_TOKENS:
            values, log_valid = self._waiting.view.float(), self._waiting_valid.view
            self._waiting, self._waiting_valid = Growing(), Growing()
            self._start(values[:, :FIT_TOKENS], log_valid[:, :FIT_TOKENS])
            self._code(values, log_valid)

    def note(self) -> None:
        super().note()
        assert self._rests is not None, "a page is put while held"
        self._rests.note()

    def put(self, page: Pages) -> None:
        assert self._rests is not None, "a page is put while held"
        keys, values = self._newest_keys(), page.values.flatten(1, 2).float()
        self._rests.put(self._rest_pages(keys, values))
        features = torch.cat([keys, self._rests.newest_keys()], -1)
        self._add(keys, features, values, page.log_valid().flatten(1))

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        if self._rests is None and len(self._waiting):
            mean = Partial.weigh(self._logits(query, fetched), self._waiting.view.float())
            return self._by_query(mean.masked(~mean.lse.isneginf()), query)
        return super().estimate(query, fetched, scores)

    @property
    def can_hold(self) -> bool:
        return super().can_hold and self._rests is not None

    def hold(self, room: Room | None) -> None:
        if self._rests is not None:
            self._rests.hold(room)

    @property
    def state_bytes(self) -> int:
        rests = 0 if self._rests is None else self._rests.index_bytes
        return super().state_bytes + self._waiting.used_bytes + rests

    @property
    def resident_bytes(self) -> int:
        own = super().resident_bytes + self._waiting.used_bytes + tensor_bytes(self._first_map, self._first_centre)
        if self._rests is None or self._rests.device != self._device:
            return own
        return own + self._rests.resident_bytes

    def _start(self, values: Tensor, log_valid: Tensor) -> None:
        """The first fit, and the transform of what it leaves, from the tokens that waited."""
        keys = self._keys(0, values.shape[1])
        weights = log_valid.exp()[..., None] / log_valid.exp().sum(1)[:, None, None].clamp_min(1)
        self._first_centre = (keys * weights).sum(1, keepdim=True)
        x = torch.cat([torch.ones_like(weights), keys - self._first_centre], -1)
        self._first_map = least_squares((x * weights).mT @ torch.cat([x, values], -1), self._ridge)
        assert self.index is not None, "built without an index"
        self._rests = TransformIndex(self._bits, self._geometry.value_dim, self.index.device)
        self._rests.reset(KeySample(values - x @ self._first_map, log_valid == 0))

    def _code(self, values: Tensor, log_valid: Tensor) -> None:
        """Code the next tokens' values, and take the tokens into the moments."""
        assert self._rests is not None, "coded before the first fit"
        start, self._n_tokens = self._n_tokens, self._n_tokens + values.shape[1]
        keys = self._keys(start, self._n_tokens)
        self._rests.absorb(self._rest_pages(keys, values))
        features = torch.cat([keys, self._rests.keys(start, self._n_tokens).to(keys.device)], -1)
        self._add(keys, features, values, log_valid)

    def _rest_pages(self, keys: Tensor, values: Tensor) -> Pages:
        """What the first fit leaves of values [rows, n, Dv] with restored keys [rows, n, D], as a page's keys."""
        rests = values - (keys - self._first_centre) @ self._first_map[:, 1:] - self._first_map[:, :1]
        return Pages(rests[:, None], rests[:, None], None)
