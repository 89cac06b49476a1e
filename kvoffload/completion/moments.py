"""``moments``: second-order cumulant of the logits with V-K covariance, their law cut off at the smallest retrieved
logit; training-free, fixed size, akin to MomentKV (arXiv:2606.01563), which stops at first order.

Over n tokens with logits of mean mu and variance s^2, of which those above tau were retrieved,
log D = log n + mu + s^2 / 2 + log Phi(a), O = vbar + C q (1 - lambda / s), a = (tau - mu - s^2) / s, lambda = phi(a) /
Phi(a).

Meant for pages of one token. With longer ones tau is the smallest log mass of a fetched page: no unread token has
a larger logit if selection was right, but the bound is loose, and what lay below it in fetched pages is counted again.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from kvoffload.buffers import tensor_bytes
from kvoffload.completion.base import Completion, CompletionConfigBase, per_query
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial, by_row

_MIN_VARIANCE = 1e-6  # of logits; fp32 does not tell less from none


class MomentsCompletionConfig(CompletionConfigBase):
    """Count, mean key, key and value sums, K-K (its triangle) and K-V sums of centred keys, fp32. With
    ``truncate=false`` the plain cumulant, from the moments of the unread tokens alone."""

    kind: Literal["moments"] = "moments"
    truncate: bool = True

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return MomentsCompletion(self.truncate, geometry, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        first, second = 2 * key_dim + value_dim, key_dim * (key_dim + 1) // 2 + key_dim * value_dim
        return (1 + first + second) * 4


class MomentsCompletion(Completion):
    """Keys are centred on the mean of the first run of pages that has tokens that count."""

    def __init__(self, truncate: bool, geometry: Geometry, device: torch.device) -> None:
        self._estimate = self._truncated if truncate else self._plain
        self._geometry, self._device = geometry, device
        self._triangle = torch.tril_indices(geometry.key_dim, geometry.key_dim, device=device)
        self.reset(torch.empty(0))

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        rows, d, dv = self._geometry.rows, self._geometry.key_dim, self._geometry.value_dim
        sizes = [(rows, 1), (rows, d), (rows, d), (rows, dv), (rows, self._triangle.shape[1]), (rows, d, dv)]
        zeros = [torch.zeros(size, device=self._device) for size in sizes]
        self._count, self._centre, self._keys, self._values, self._kk, self._kv = zeros

    def absorb(self, pages: Pages) -> None:
        valid = pages.log_valid().flatten(1).exp()[..., None]
        keys, values = pages.keys.flatten(1, 2).float(), pages.values.flatten(1, 2).float() * valid
        mean = (keys * valid).sum(1) / valid.sum(1).clamp_min(1)
        self._centre = torch.where(self._count > 0, self._centre, mean)
        centred = (keys - self._centre[:, None]) * valid
        self._count += valid.sum(1)
        self._keys += centred.sum(1)
        self._values += values.sum(1)
        self._kk += (centred.mT @ centred)[:, self._triangle[0], self._triangle[1]]
        self._kv += centred.mT @ values

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        centre = per_query(self._centre, query)
        logits = query[fetched.row_ids] @ (fetched.keys.float() - centre[fetched.row_ids][:, None]).mT  # [F, R, S]
        moments, taken = self._moments(query), _fetched_moments(query, fetched, logits)
        rest = self._estimate(moments, taken, _threshold(query, fetched, logits))
        remains = (moments - taken)[..., 0] > 0.5
        base = torch.einsum("grd,gd->gr", query, centre)
        return Partial(rest.output, rest.lse + base).masked(remains)

    @property
    def state_bytes(self) -> int:
        return tensor_bytes(self._count, self._centre, self._keys, self._values, self._kk, self._kv)

    def _moments(self, query: Tensor) -> Tensor:
        """Sums over all tokens of 1, z, z^2, v and z v with z = q . (k - centre), fp32 [rows * Q, R, 3 + 2 Dv]."""
        q = by_row(query, self._geometry.rows)
        square = q.new_zeros(q.shape[0], q.shape[-1], q.shape[-1])
        square[:, self._triangle[0], self._triangle[1]] = self._kk
        square[:, self._triangle[1], self._triangle[0]] = self._kk
        count, values = (x[:, None].expand(-1, q.shape[1], -1) for x in (self._count, self._values))
        second = ((q @ square) * q).sum(-1, keepdim=True)
        moments = torch.cat([count, q @ self._keys[..., None], second, values, q @ self._kv], dim=-1)
        return moments.reshape(*query.shape[:2], -1)

    @staticmethod
    def _truncated(moments: Tensor, taken: Tensor, threshold: Tensor) -> Partial:
        log_count, mean, variance, value, covariance = _cumulants(moments)
        spread = variance.clamp_min(_MIN_VARIANCE).sqrt()
        a = (threshold - mean) / spread - spread
        mills = math.sqrt(2 / math.pi) / torch.special.erfcx(-a / math.sqrt(2))  # phi(a) / Phi(a)
        lse = log_count + mean + variance / 2 + torch.special.log_ndtr(a)
        return Partial(value + covariance * (1 - mills / spread)[..., None], lse)

    @staticmethod
    def _plain(moments: Tensor, taken: Tensor, threshold: Tensor) -> Partial:
        log_count, mean, variance, value, covariance = _cumulants(moments - taken)
        return Partial(value + covariance, log_count + mean + variance / 2)


def _fetched_moments(query: Tensor, fetched: Fetched, logits: Tensor) -> Tensor:
    """The same sums over the fetched tokens with centred logits [F, R, S]."""
    valid = fetched.log_valid().exp()[:, None].expand_as(logits)
    weighted, values = logits * valid, fetched.values.float()
    parts = [x.sum(-1, keepdim=True) for x in (valid, weighted, weighted * logits)]
    moments = torch.cat([*parts, valid @ values, weighted @ values], dim=-1)
    return moments.new_zeros(*query.shape[:2], moments.shape[-1]).index_add_(0, fetched.row_ids, moments)


def _threshold(query: Tensor, fetched: Fetched, logits: Tensor) -> Tensor:
    """The smallest log mass of a fetched page, [rows * Q, R]; inf where none was fetched."""
    masses = (logits + fetched.log_valid()[:, None]).logsumexp(-1)
    masses = masses.masked_fill(masses.isneginf(), torch.inf)
    rows = fetched.row_ids[:, None].expand_as(masses)
    return query.new_full(query.shape[:2], torch.inf).scatter_reduce_(0, rows, masses, "amin")


def _cumulants(moments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log count, mean and variance of z, mean value and covariance of v with z, from their sums."""
    count = moments[..., 0].clamp_min(1)
    mean, second = moments[..., 1] / count, moments[..., 2] / count
    value, cross = (moments[..., 3:] / count[..., None]).chunk(2, dim=-1)
    return count.log(), mean, (second - mean.square()).clamp_min(0), value, cross - mean[..., None] * value
