"""``transform``: a token-level index of transform-coded keys (kernels/README.md, "Transform-coded keys")."""

from typing import ClassVar, Literal

import torch
from kvoffload_kernels.transform_code.reference import code_bytes, n_levels, tier_widths
from pydantic import field_validator

from kvoffload.geometry import Geometry
from kvoffload.index.transform import FIT_TOKENS, TransformIndex
from kvoffload.selection.base import Selector, SelectorConfigBase
from kvoffload.selection.indexed import IndexedSelector


class TransformSelectorConfig(SelectorConfigBase):
    """Keys at ``bits`` bits a channel on average, in the basis where keys are uncorrelated and queries white."""

    kind: Literal["transform"] = "transform"
    bits: float = 2.25
    has_index: ClassVar[bool] = True
    holds: ClassVar[bool] = True

    @field_validator("bits")
    @classmethod
    def _known(cls, bits: float) -> float:
        tier_widths(bits, 8)
        return bits

    def build(self, geometry: Geometry, device: torch.device) -> Selector:
        index = TransformIndex(self.bits, geometry.key_dim, device)
        return IndexedSelector(index, geometry.page_size, uses_sample=True)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        if n_tokens < FIT_TOKENS:
            return n_tokens * key_dim * itemsize
        widths = tier_widths(self.bits, key_dim)
        return n_tokens * code_bytes(widths) + 2 * key_dim * (sum(widths) + 1) + 2 * n_levels(widths)
