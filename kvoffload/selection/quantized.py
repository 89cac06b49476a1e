"""``quantized``: a token-level index of 1, 2 or 4 bit keys (kernels/README.md); the page score is the log-sum-exp
of its tokens' approximate logits."""

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from kvoffload_kernels.page_scores.reference import quantise, score_tokens
from pydantic import Field, model_validator
from torch import Tensor

from kvoffload.buffers import Growing, tensor_bytes
from kvoffload.geometry import Geometry
from kvoffload.selection.base import Selector, SelectorConfigBase
from kvoffload.values import Pages


class QuantizedSelectorConfig(SelectorConfigBase):
    """Keys at ``bits`` bits a channel, per channel in groups of ``group`` tokens."""

    kind: Literal["quantized"] = "quantized"
    bits: Literal[1, 2, 4] = 2
    group: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _power_of_two(self) -> "QuantizedSelectorConfig":
        if self.group & (self.group - 1):
            raise ValueError(f"group must be a power of two, not {self.group}")
        return self

    def build(self, geometry: Geometry, device: torch.device) -> Selector:
        return QuantizedSelector(self.bits, max(self.group, geometry.page_size), geometry, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        group = max(self.group, page_size)
        n_groups = -(-n_tokens // group)
        return n_groups * (group * key_dim * self.bits // 8 + 4 * key_dim)


class QuantizedSelector(Selector):
    """Groups of tokens are closed as they fill; the open one (less than a group) is also kept as it is and quantised
    anew with every page, so that its tokens are in the index too."""

    def __init__(self, bits: int, group: int, geometry: Geometry, device: torch.device) -> None:
        if geometry.key_dim * bits % 8:
            raise ValueError(f"a head size of {geometry.key_dim} does not fill whole bytes at {bits} bits a channel")
        self.device = device
        self._bits, self._group, self._page_size = bits, group, geometry.page_size
        self.reset(torch.empty(0))

    def reset(self, anchor: Tensor) -> None:
        self._codes, self._zero, self._step = Growing(), Growing(), Growing()
        self._open_keys: Tensor | None = None  # tokens of the group that is not full yet, [rows, T, D]
        self._open_valid: Tensor | None = None
        self._n_tokens = 0
        self._padding: Tensor | None = None  # tokens at the front of each row that do not count, int64 [rows, 1, 1]

    def absorb(self, pages: Pages) -> None:
        pages = pages.to(self.device)
        keys = pages.keys.flatten(1, 2)
        valid = torch.ones(keys.shape[:2], dtype=torch.bool, device=self.device)
        if pages.valid is not None:
            valid = pages.valid.flatten(1, 2)
            missing = (~valid).sum(1)[:, None, None]
            self._padding = missing if self._padding is None else self._padding + missing
        self._n_tokens += keys.shape[1]
        if self._open_keys is not None and self._open_valid is not None:
            keys, valid = torch.cat([self._open_keys, keys], 1), torch.cat([self._open_valid, valid], 1)
            for buffer in (self._codes, self._zero, self._step):
                buffer.truncate(len(buffer) - 1)
        closed = keys.shape[1] // self._group * self._group
        self._quantise(keys[:, :closed], valid[:, :closed])
        self._set_open(keys[:, closed:], valid[:, closed:])

    def score(self, query: Tensor) -> Tensor:
        logits = score_tokens(query, self._codes.view, self._zero.view, self._step.view, self._bits)
        logits = logits[..., : self._n_tokens]
        if self._padding is not None:
            position = torch.arange(self._n_tokens, device=self.device)
            logits = logits.masked_fill(position < self._padding, -torch.inf)
        return logits.view(*query.shape[:2], -1, self._page_size).logsumexp(-1)

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
