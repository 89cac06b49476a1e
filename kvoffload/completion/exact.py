"""``exact``: the true remainder, from a second copy of the KV on the device, all of it charged in every step; the
oracle that tests merge against."""

from typing import Literal

import torch
from torch import Tensor

from kvoffload.buffers import Growing
from kvoffload.completion.base import Completion, CompletionConfigBase, per_query
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial, by_row


class ExactCompletionConfig(CompletionConfigBase):
    """All keys and values in the KV's own dtype."""

    kind: Literal["exact"] = "exact"

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return ExactCompletion(geometry)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return n_tokens * (key_dim + value_dim) * itemsize


class ExactCompletion(Completion):
    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self.reset(torch.empty(0))

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        self._keys, self._values, self._log_valid = Growing(), Growing(), Growing()

    def absorb(self, pages: Pages) -> None:
        self._keys.append(pages.keys)
        self._values.append(pages.values)
        self._log_valid.append(pages.log_valid())

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        if len(self._keys) == 0:
            return Partial.empty(query, self._geometry.value_dim)
        read = fetched.mask(query.shape[0], len(self._keys))
        keep = per_query(self._log_valid.view, query).masked_fill(read[..., None], -torch.inf)
        keys = self._keys.view.float().flatten(1, 2)
        logits = (by_row(query, keys.shape[0]) @ keys.transpose(-1, -2)).view(*query.shape[:2], -1)
        if self._geometry.softcap is not None:
            logits = torch.tanh(logits / self._geometry.softcap) * self._geometry.softcap
        return Partial.weigh(logits + keep.flatten(1)[:, None], self._values.view.float().flatten(1, 2))

    @property
    def state_bytes(self) -> int:
        return self._keys.used_bytes + self._values.used_bytes
