"""``quantized``: a token-level index of 1, 2 or 4 bit keys (kernels/README.md, "Token scores")."""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from kvoffload.geometry import Geometry
from kvoffload.index.quantized import QuantizedIndex
from kvoffload.selection.base import Selector, SelectorConfigBase
from kvoffload.selection.indexed import IndexedSelector


class QuantizedSelectorConfig(SelectorConfigBase):
    """Keys at ``bits`` bits a channel, per channel in groups of ``group`` tokens."""

    kind: Literal["quantized"] = "quantized"
    bits: Literal[1, 2, 4] = 2
    group: int = Field(64, ge=1)
    has_index: ClassVar[bool] = True
    holds: ClassVar[bool] = True

    @model_validator(mode="after")
    def _power_of_two(self) -> "QuantizedSelectorConfig":
        if self.group & (self.group - 1):
            raise ValueError(f"group must be a power of two, not {self.group}")
        return self

    def build(self, geometry: Geometry, device: torch.device) -> Selector:
        if geometry.key_dim * self.bits % 8:
            raise ValueError(
                f"a head size of {geometry.key_dim} does not fill whole bytes at {self.bits} bits a channel"
            )
        index = QuantizedIndex(self.bits, max(self.group, geometry.page_size), device)
        return IndexedSelector(index, geometry.page_size, uses_sample=False)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        group = max(self.group, page_size)
        n_groups = -(-n_tokens // group)
        return n_groups * (group * key_dim * self.bits // 8 + 4 * key_dim)
