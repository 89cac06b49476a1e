"""``exact``: the token oracle. It reads every key of the middle region in every step, and is charged for it."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvoffload.buffers import Growing
from kvoffload.geometry import Geometry
from kvoffload.selection.base import Selector, SelectorConfigBase
from kvoffload.values import Pages


class ExactSelectorConfig(SelectorConfigBase):
    """All keys in the KV's own dtype, in host memory."""

    kind: Literal["exact"] = "exact"
    reads_slow_tier: ClassVar[bool] = True

    def build(self, geometry: Geometry, device: torch.device) -> Selector:
        return ExactSelector()

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return n_tokens * key_dim * itemsize


class ExactSelector(Selector):
    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.reset(torch.empty(0))

    def reset(self, anchor: Tensor) -> None:
        self._keys, self._log_valid = Growing(), Growing()

    def absorb(self, pages: Pages) -> None:
        pages = pages.to(self.device)
        self._keys.append(pages.keys)
        self._log_valid.append(pages.log_valid())

    def score(self, query: Tensor) -> Tensor:
        logits = torch.einsum("grd,gpsd->grps", query, self._keys.view.float())
        return (logits + self._log_valid.view[:, None]).logsumexp(-1)

    @property
    def index_bytes(self) -> int:
        return self._keys.used_bytes
