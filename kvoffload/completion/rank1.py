"""``rank1``: RESA's residual estimation (ICLR 2026, OpenReview ktcq26hMCH): a token's logit is its prior mu_Q . k_j
plus one bias (q - mu_Q) . mu_K for all, so mass and output of the prior are summed once, Z and O_est.

The fetched tokens' prior terms are taken out exactly (the paper's delta merge), and ``weight`` is the paper's lambda
on what is left. Inferred, the full text was not at hand: mu_Q is the mean of the prompt's last queries, shared by the
query heads of a kv head; mu_K is the mean over all sealed keys and not corrected for the fetched ones.
"""

from typing import Literal

import torch
from kvoffload_kernels.completion.reference import tilted_sums
from pydantic import Field
from torch import Tensor

from kvoffload.buffers import tensor_bytes
from kvoffload.completion.base import Completion, CompletionConfigBase, per_query
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial

_EMPTY = 1e-6  # below this share of the prior mass what is left is rounding


class Rank1CompletionConfig(CompletionConfigBase):
    """Z, O_est, mu_Q, mu_K and their scale and count, fp32; ``weight`` multiplies the estimated mass."""

    kind: Literal["rank1"] = "rank1"
    weight: float = Field(1.0, gt=0, le=1)

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return Rank1Completion(self.weight, geometry, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return (2 * key_dim + value_dim + 3) * 4


class Rank1Completion(Completion):
    """Prior sums are kept relative to a row's largest prior logit so far."""

    uses_anchor = True

    def __init__(self, weight: float, geometry: Geometry, device: torch.device) -> None:
        self._weight, self._geometry, self._device = weight, geometry, device
        self.reset(torch.zeros(geometry.rows, geometry.key_dim, device=device))

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        rows = self._geometry.rows
        self._anchor, self._key_sum = anchor, torch.zeros(rows, self._geometry.key_dim, device=self._device)
        self._prior = torch.zeros(rows, 1 + self._geometry.value_dim, device=self._device)  # Z and Z O_est
        self._log_scale = torch.full((rows,), -torch.inf, device=self._device)
        self._count = torch.zeros(rows, device=self._device)

    def absorb(self, pages: Pages) -> None:
        keys, log_valid = pages.keys.flatten(1, 2).float(), pages.log_valid().flatten(1)
        logits = (keys @ self._anchor[..., None])[..., 0] + log_valid
        log_scale = torch.maximum(self._log_scale, logits.amax(1))
        self._prior *= (self._log_scale - _finite(log_scale)).exp()[:, None]
        self._log_scale = log_scale
        self._prior += _prior_sums(pages.values.flatten(1, 2), logits - _finite(log_scale)[:, None])
        self._key_sum += (log_valid.exp()[:, None] @ keys)[:, 0]
        self._count += pages.counts().sum(-1)

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        anchor, prior = per_query(self._anchor, query), per_query(self._prior, query)
        scale = per_query(_finite(self._log_scale), query)
        left, count = self._without(fetched, prior, anchor, scale, per_query(self._count, query))
        mass = left[:, :1]
        remains = (count[:, None] > 0.5) & (mass > _EMPTY * prior[:, :1])
        mean_key = per_query(self._key_sum / self._count.clamp_min(1)[:, None], query)
        bias = torch.einsum("grd,gd->gr", query - anchor[:, None], mean_key)
        safe = torch.where(remains, mass * self._weight, 1.0)
        values = (left[:, 1:] / torch.where(remains, mass, 1.0))[:, None]
        rest = Partial(values.expand(*bias.shape, -1), safe.log() + scale[:, None] + bias)
        return rest.masked(remains.expand_as(bias))

    @property
    def state_bytes(self) -> int:
        return tensor_bytes(self._anchor, self._key_sum, self._prior, self._log_scale, self._count)

    @staticmethod
    def _without(
        fetched: Fetched, prior: Tensor, anchor: Tensor, scale: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Prior sums and token counts without the fetched slices; all tensors in query rows."""
        rows, log_valid = fetched.row_ids, fetched.log_valid()
        logits = torch.einsum("fd,fsd->fs", anchor[rows], fetched.keys.float()) + log_valid
        taken = _prior_sums(fetched.values, logits - scale[rows][:, None])
        left = prior.index_add(0, rows, taken, alpha=-1)
        return left, count.index_add(0, rows, log_valid.exp().sum(-1), alpha=-1)


def _prior_sums(values: Tensor, log_weight: Tensor) -> Tensor:
    """Sums of e^log_weight and of it times the values [..., S, Dv], [..., 1 + Dv]."""
    return tilted_sums(values[..., :0], values, log_weight)


def _finite(log_scale: Tensor) -> Tensor:
    return log_scale.masked_fill(log_scale.isneginf(), 0.0)
