"""``regression``: the remainder as attention over the selector's own index, its values regressed on the restored keys.

Keys and values of a token are both linear in one hidden state, so much of a value can be told from its key: per row
v = k W + b by weighted least squares over all sealed tokens. The remainder's weights are those of the index,
its output is then one affine map of the weighted mean key (kernels/README.md, "Regressed values").
"""

from typing import ClassVar, Literal

import torch
from kvoffload_kernels.dense_attention.reference import soft_cap
from pydantic import Field
from torch import Tensor

from kvoffload.buffers import page_mask, tensor_bytes
from kvoffload.completion.base import Completion, CompletionConfigBase
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial, by_row

_REFIT_GROWTH = 1.125  # the fit is made anew when there are so many times more tokens


class RegressionCompletionConfig(CompletionConfigBase):
    """``ridge`` is added to the key covariance, as a share of its mean variance."""

    kind: Literal["regression"] = "regression"
    ridge: float = Field(0.01, gt=0, allow_inf_nan=False)
    needs_index: ClassVar[bool] = True

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return RegressionCompletion(self.ridge, geometry, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return (key_dim + 1) * value_dim * 4


class RegressionCompletion(Completion):
    """Half of a token's weight in the fit is its attention under the anchor, half is the same for all tokens: where
    queries look the fit must hold, and elsewhere it must not run wild."""

    uses_scores, uses_anchor = True, True

    def __init__(self, ridge: float, geometry: Geometry, device: torch.device) -> None:
        self._ridge, self._geometry, self._device = ridge, geometry, device
        self.reset(torch.zeros(geometry.rows, geometry.key_dim, device=device))

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        sizes, rows = self._geometry, self._geometry.rows
        width = 1 + sizes.key_dim
        self._anchor, self._centre = anchor, torch.zeros(rows, 1, sizes.key_dim, device=self._device)
        self._log_scale = torch.full((rows,), -torch.inf, device=self._device)
        # sums over tokens of w x^T (x, v) with x = (1, k - centre), for w = 1 and w = e^(q0 . k - log_scale)
        self._moments = torch.zeros(2, rows, width, width + sizes.value_dim, device=self._device)
        self._map = torch.zeros(rows, width, sizes.value_dim, device=self._device)
        self._n_tokens = self._fitted_tokens = 0

    def absorb(self, pages: Pages) -> None:
        assert self.index is not None, "built without an index"
        n_tokens = pages.n_pages * self._geometry.page_size
        keys = self.index.keys(self._n_tokens, self._n_tokens + n_tokens).to(self._device)
        log_valid = pages.log_valid().flatten(1)
        if self._n_tokens == 0:
            valid = log_valid.exp()[..., None]
            self._centre = (keys * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp_min(1)
        logits = (keys @ self._anchor[..., None])[..., 0] + log_valid
        self._rescale(torch.maximum(self._log_scale, logits.amax(-1)))
        weights = torch.stack([log_valid.exp(), (logits - self._shift()[:, None]).exp()])
        ones = torch.ones_like(keys[..., :1])
        x = torch.cat([ones, keys - self._centre], -1)
        self._moments += (x * weights[..., None]).mT @ torch.cat([x, pages.values.flatten(1, 2).float()], -1)
        self._n_tokens += n_tokens

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        if self._n_tokens == 0:
            return Partial.empty(query, self._geometry.value_dim)
        assert self.index is not None, "built without an index"
        if self._n_tokens >= self._fitted_tokens * _REFIT_GROWTH:
            self._fit()
        rows, size = self._geometry.rows, self._geometry.page_size
        logits = soft_cap(self.index.logits(by_row(query, rows).to(self.index.device)), self._geometry.softcap)
        read = page_mask(fetched.page_ids, fetched.row_ids, query.shape[0], self._n_tokens // size).to(logits.device)
        pages = logits.reshape(*query.shape[:2], -1, size).masked_fill(read[:, None, :, None], -torch.inf)
        mean = Partial.weigh(pages.reshape(rows, -1, self._n_tokens), self.index.keys(0, self._n_tokens))
        keys, lse = mean.output.to(query.device), mean.lse.to(query.device)
        values = (keys - self._centre) @ self._map[:, 1:] + self._map[:, :1]
        remainder = Partial(values.reshape(*query.shape[:2], -1), lse.reshape(query.shape[:2]))
        return remainder.masked(~remainder.lse.isneginf())

    @property
    def state_bytes(self) -> int:
        return tensor_bytes(self._map)

    @property
    def resident_bytes(self) -> int:
        return tensor_bytes(self._map, self._moments, self._centre)

    def _shift(self) -> Tensor:
        return self._log_scale.masked_fill(self._log_scale.isneginf(), 0.0)

    def _rescale(self, log_scale: Tensor) -> None:
        factor = (self._log_scale - log_scale.masked_fill(log_scale.isneginf(), 0.0)).exp()
        self._moments[1] *= factor[:, None, None]
        self._log_scale = log_scale

    def _fit(self) -> None:
        """Least squares from the moments; no host round trip."""
        self._fitted_tokens = self._n_tokens
        tiny = torch.finfo(torch.float32).tiny
        moments = (self._moments / self._moments[..., :1, :1].clamp_min(tiny)).mean(0)
        means = moments[:, :1]  # of (1, k, v)
        centred = (moments - means[..., : moments.shape[1]].mT @ means)[:, 1:, 1:]
        covariance, cross = centred.split([self._geometry.key_dim, self._geometry.value_dim], dim=-1)
        size = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(tiny)[:, None, None]
        ridge = self._ridge * size * torch.eye(self._geometry.key_dim, device=self._device)
        root = torch.linalg.cholesky_ex(covariance + ridge).L
        slope = torch.cholesky_solve(cross, root)
        mean_keys, mean_values = means[..., 1:].split(list(cross.shape[-2:]), dim=-1)
        self._map = torch.cat([mean_values - mean_keys @ slope, slope], dim=1)
