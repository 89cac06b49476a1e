"""``regression``: the remainder as attention over the selector's own index, its values regressed on the restored keys.

Keys and values of a token are both linear in one hidden state, so much of a value can be told from its key: per row
v = k W + b by weighted least squares over all sealed tokens. The remainder's weights are those of the index,
its output is then one affine map of the weighted mean key (kernels/README.md, "Regressed values").
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvoffload.buffers import tensor_bytes
from kvoffload.completion.base import Completion, CompletionConfigBase
from kvoffload.cross_sums import cross_sums
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial, Parts, by_row

_LEAST_VARIANCE = 1e-20  # where no token counts yet
_REFIT_GROWTH = 1.125  # the fit is made anew when there are so many times more tokens


class RegressionConfigBase(CompletionConfigBase):
    """``ridge`` is added to the features' covariance, as a share of its mean variance."""

    ridge: float = Field(0.01, gt=0, allow_inf_nan=False)
    needs_index: ClassVar[bool] = True


def moment_bytes(n_features: int, value_dim: int) -> int:
    """What the fit of one row is made from: its moments and centre, fp32."""
    return (2 * (1 + n_features) * (1 + n_features + value_dim) + n_features) * 4


class RegressionCompletionConfig(RegressionConfigBase):
    """Features are the restored keys."""

    kind: Literal["regression"] = "regression"
    holds: ClassVar[bool] = True

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return RegressionCompletion(self.ridge, geometry, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return (key_dim + 1) * value_dim * 4

    def resident_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        state = self.index_bytes(n_tokens, key_dim, value_dim, page_size, itemsize)
        return state + moment_bytes(key_dim, value_dim)


class RegressionCompletion(Completion):
    """Half of a token's weight in the fit is its attention under the anchor, half is the same for all tokens: where
    queries look the fit must hold, and elsewhere it must not run wild."""

    uses_scores, uses_anchor, reads_slices = True, True, False
    row_state: ClassVar[tuple[str, ...]] = ("index", "_anchor", "_centre", "_log_scale", "_moments")

    def __init__(self, ridge: float, geometry: Geometry, device: torch.device) -> None:
        self._ridge, self._geometry, self._device = ridge, geometry, device
        self.reset(torch.zeros(geometry.rows, geometry.key_dim, device=device))

    @property
    def _n_features(self) -> int:
        return self._geometry.key_dim

    def _keys(self, start: int, stop: int) -> Tensor:
        """The restored keys of tokens start .. stop - 1, fp32 [rows, stop - start, D]."""
        assert self.index is not None, "built without an index"
        return self.index.keys(start, stop).to(self._device)

    def _newest_keys(self) -> Tensor:
        """While held, those of the newest page."""
        assert self.index is not None, "built without an index"
        return self.index.newest_keys()

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        rows, width, value_dim = self._geometry.rows, 1 + self._n_features, self._geometry.value_dim
        if self.index is not None:
            self.index.hands_on = True
        self._anchor = anchor
        self._centre = torch.zeros(rows, 1, self._n_features, device=self._device)
        self._log_scale = torch.full((rows,), -torch.inf, device=self._device)
        # sums over tokens of w x^T (x, v) with x = (1, features - centre), for w = 1 and w = e^(q0 . k - log_scale)
        moments = torch.zeros(2, rows, width, width + value_dim, device=self._device)
        self._moments = moments[0], moments[1]
        self._map = torch.zeros(rows, width, value_dim, device=self._device)
        self._n_tokens = self._fitted_tokens = 0

    def absorb(self, pages: Pages) -> None:
        values = pages.values.flatten(1, 2).float()
        start, self._n_tokens = self._n_tokens, self._n_tokens + values.shape[1]
        keys = self._keys(start, self._n_tokens)
        self._add(keys, keys, values, pages.log_valid().flatten(1))

    def note(self) -> None:
        self._n_tokens += self._geometry.page_size

    def put(self, page: Pages) -> None:
        keys = self._newest_keys()
        self._add(keys, keys, page.values.flatten(1, 2).float(), page.log_valid().flatten(1))

    def refresh(self) -> None:
        if self._n_tokens and self._n_tokens >= self._fitted_tokens * _REFIT_GROWTH:
            self._fit()

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        if self._n_tokens == 0:
            return Partial.empty(query, self._geometry.value_dim)
        self.refresh()
        rest = self._regressed(query, fetched)
        return rest.masked(~rest.lse.isneginf())

    def estimate_parts(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Parts:
        return Parts.of(self._regressed(query, fetched))

    def _regressed(self, query: Tensor, fetched: Fetched) -> Partial:
        """The estimate; outputs are anything finite where nothing remains."""
        mean = self._by_query(self._mean_features(query, fetched), query)
        values = (by_row(mean.output, self._geometry.rows) - self._centre) @ self._map[:, 1:] + self._map[:, :1]
        return Partial(values.reshape(*query.shape[:2], -1), mean.lse)

    @property
    def can_hold(self) -> bool:
        return self._n_tokens > 0 and self.index is not None and self.index.can_hold

    @property
    def state_bytes(self) -> int:
        return tensor_bytes(self._map)

    @property
    def resident_bytes(self) -> int:
        return tensor_bytes(self._map, *self._moments, self._centre)

    def _add(self, keys: Tensor, features: Tensor, values: Tensor, log_valid: Tensor) -> None:
        """Take tokens into the moments: restored keys fp32 [rows, n, D], what values are regressed on [rows, n, F],
        values [rows, n, Dv], 0 or -inf [rows, n]."""
        valid = log_valid.exp()
        self._centre_on(features, valid)
        logits = (keys @ self._anchor[..., None])[..., 0] + log_valid
        self._rescale(torch.maximum(self._log_scale, logits.amax(-1)))
        x = torch.cat([torch.ones_like(features[..., :1]), features - self._centre], -1)
        both = torch.cat([x, values], -1)
        for moments, weights in zip(self._moments, (valid, (logits - self._shift()[:, None]).exp()), strict=True):
            moments.add_(cross_sums(x * weights[..., None], both))

    def _centre_on(self, features: Tensor, valid: Tensor) -> None:
        """The first run of a row with a token that counts says where its features are taken to lie."""
        counts = valid.sum(1)[:, None, None]
        mean = (features * valid[..., None]).sum(1, keepdim=True) / counts.clamp_min(1)
        fresh = (self._moments[0][:, :1, :1] == 0) & (counts > 0)
        self._centre.copy_(torch.where(fresh, mean, self._centre))

    def _mean_features(self, query: Tensor, fetched: Fetched) -> Partial:
        """Attention of scaled queries [rows * Q, R, D] over the features of every token that was not fetched: a partial
        [rows, Q * R]."""
        assert self.index is not None, "built without an index"
        shape = self._geometry
        return self.index.attend(*self._asked(query, fetched), shape.page_size, shape.softcap)

    def _asked(self, query: Tensor, fetched: Fetched) -> tuple[Tensor, Tensor]:
        """Queries [rows, Q * R, D], and which pages were fetched for them, bool [rows * Q, P], where the index is."""
        assert self.index is not None, "built without an index"
        read = fetched.mask(query.shape[0], self.index.span // self._geometry.page_size)
        return by_row(query, self._geometry.rows).to(self.index.device), read.to(self.index.device)

    @staticmethod
    def _by_query(part: Partial, query: Tensor) -> Partial:
        """A partial [rows, Q * R] as [rows * Q, R], on the query's device."""
        output, lse = part.output.to(query.device), part.lse.to(query.device)
        return Partial(output.reshape(*query.shape[:2], -1), lse.reshape(query.shape[:2]))

    def _shift(self) -> Tensor:
        return self._log_scale.masked_fill(self._log_scale.isneginf(), 0.0)

    def _rescale(self, log_scale: Tensor) -> None:
        factor = (self._log_scale - log_scale.masked_fill(log_scale.isneginf(), 0.0)).exp()
        self._moments[1].mul_(factor[:, None, None])
        self._log_scale.copy_(log_scale)

    def _fit(self) -> None:
        """Least squares from the moments; no host round trip."""
        self._fitted_tokens = self._n_tokens
        tiny = torch.finfo(torch.float32).tiny
        plain, tilted = (moments / moments[:, :1, :1].clamp_min(tiny) for moments in self._moments)
        self._map.copy_(least_squares((plain + tilted) / 2, self._ridge))


def least_squares(moments: Tensor, ridge: float) -> Tensor:
    """The affine map fp32 [rows, 1 + F, Dv] of features to values from mean moments [rows, 1 + F, 1 + F + Dv], of which
    the first row are the means of (1, features, values)."""
    n_features = moments.shape[1] - 1
    means = moments[:, :1]
    centred = (moments - means[..., : n_features + 1].mT @ means)[:, 1:, 1:]
    covariance, cross = centred.split([n_features, centred.shape[-1] - n_features], dim=-1)
    size = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(_LEAST_VARIANCE)[:, None, None]
    root = torch.linalg.cholesky_ex(covariance + ridge * size * torch.eye(n_features, device=moments.device)).L
    slope = torch.cholesky_solve(cross, root)
    mean_features, mean_values = means[..., 1:].split(list(cross.shape[-2:]), dim=-1)
    return torch.cat([mean_values - mean_features @ slope, slope], dim=1)
