"""``mean_value``: SparQ (arXiv:2312.04985, "mean value reallocation"): the mass that the selector's scores give to the
unread pages goes to one mean value.

The paper shares out 1 = alpha + (1 - alpha) by the approximate scores alone; here the read part keeps its exact mass.
Its mean is over all values, here over the unread ones.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvoffload.buffers import tensor_bytes
from kvoffload.completion.base import Completion, CompletionConfigBase, per_query
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial


class MeanValueCompletionConfig(CompletionConfigBase):
    """Sum and count of the values, fp32."""

    kind: Literal["mean_value"] = "mean_value"
    holds: ClassVar[bool] = True

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return MeanValueCompletion(geometry, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return (value_dim + 1) * 4


class MeanValueCompletion(Completion):
    uses_scores = True
    row_state = ("_sums",)

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        self._geometry, self._device = geometry, device
        self.reset(torch.empty(0))

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        self._sums = torch.zeros(self._geometry.rows, self._geometry.value_dim + 1, device=self._device)  # and count

    def absorb(self, pages: Pages) -> None:
        self._sums += _sums(pages.values, pages.log_valid()).sum(1)

    def put(self, page: Pages) -> None:
        self.absorb(page)

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        taken = _sums(fetched.values, fetched.log_valid())
        left = per_query(self._sums, query).index_add(0, fetched.row_ids, taken, alpha=-1)
        mean = left[:, :-1] / left[:, -1:].clamp_min(1.0)
        read = fetched.mask(*scores.shape[::2])
        lse = scores.masked_fill(read[:, None], -torch.inf).logsumexp(-1)
        remains = ~lse.isneginf() & (left[:, -1:] > 0.5)
        return Partial(mean[:, None].expand(*lse.shape, -1), lse).masked(remains)

    @property
    def can_hold(self) -> bool:
        return True

    @property
    def state_bytes(self) -> int:
        return tensor_bytes(self._sums)


def _sums(values: Tensor, log_valid: Tensor) -> Tensor:
    """Sum of the values and number of the tokens of each page: values [..., S, Dv] to [..., Dv + 1]."""
    valid = log_valid.exp()
    summed = (valid[..., None, :] @ values.float())[..., 0, :]
    return torch.cat([summed, valid.sum(-1, keepdim=True)], dim=-1)
