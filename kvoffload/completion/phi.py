"""``phi``: the fixed-size linear-attention completion of arXiv:2604.05438 (kernels/README.md, "Completion").

Per row u = sum phi(k_j) and S = sum phi(k_j) v_j over all sealed tokens; the fetched tokens' phi(q) . phi(k_i) are
recomputed from their keys and removed from numerator and denominator; no outer product is formed for them.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor

from kvoffload.buffers import tensor_bytes
from kvoffload.completion.base import Completion, CompletionConfigBase
from kvoffload.completion.feature_maps import FeatureMap, LearnedMap, RandomMap
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial

_EMPTY = 1e-5  # a remainder below this share of the summary is rounding: fp32 sums over all fetched tokens


class PhiCompletionConfig(CompletionConfigBase):
    """``features`` random positive features, or the calibrated map in ``map`` (a safetensors file)."""

    kind: Literal["phi"] = "phi"
    features: int = Field(64, ge=1, le=65536)
    seed: int = 0
    map: Path | None = None

    @model_validator(mode="after")
    def _map_exists(self) -> "PhiCompletionConfig":
        try:
            if self.map is not None:
                LearnedMap.n_features_of(self.map)
        except (OSError, SafetensorError, StopIteration) as error:
            raise ValueError(
                f"map must be a safetensors file of feature maps, and {str(self.map)!r} is none"
            ) from error
        return self

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        if self.map is not None:
            return PhiCompletion(LearnedMap(self.map, layer, geometry, device), geometry, device)
        return PhiCompletion(RandomMap(self.features, self.seed + layer, geometry, device), geometry, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        n_features = self.features if self.map is None else LearnedMap.n_features_of(self.map)
        return n_features * (value_dim + 1) * 4


class PhiCompletion(Completion):
    """The state is kept relative to a row's largest log feature so far (``_log_scale``), which leaves room for e^60
    and more."""

    def __init__(self, features: FeatureMap, geometry: Geometry, device: torch.device) -> None:
        self._features, self._geometry, self._device = features, geometry, device
        self.reset(torch.zeros(geometry.rows, geometry.key_dim, device=device))

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        self._features.reset(anchor)
        rows, m = self._geometry.rows, self._features.n_features
        self._state = torch.zeros(rows, m, self._geometry.value_dim + 1, device=self._device)  # S and u side by side
        self._log_scale = torch.full((rows,), -torch.inf, device=self._device)
        self._n_tokens = torch.zeros(rows, device=self._device)

    def absorb(self, pages: Pages) -> None:
        rows = pages.keys.shape[0]
        keys, values = pages.keys.flatten(1, 2), pages.values.flatten(1, 2).float()
        log_phi = self._features.log_keys(keys, torch.arange(rows, device=self._device))
        log_phi = log_phi + pages.log_valid().flatten(1)[..., None]
        log_scale = torch.maximum(self._log_scale, log_phi.amax((1, 2)))
        self._state *= (self._log_scale - _finite(log_scale)).exp()[:, None, None]
        self._log_scale = log_scale
        phi = (log_phi - _finite(log_scale)[:, None, None]).exp().transpose(-1, -2)
        self._state += phi @ torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        self._n_tokens += pages.counts().sum(-1)

    def estimate(self, query: Tensor, fetched: Fetched) -> Partial:
        log_phi = self._features.log_query(query)
        top = log_phi.amax(-1)
        phi = (log_phi - top[..., None]).exp()
        total = phi @ self._state  # [rows, R, Dv + 1]
        left = total - self._fetched_terms(phi, fetched)
        mass = left[..., -1]
        remains = (self._tokens_left(fetched) > 0.5)[:, None] & (mass > _EMPTY * total[..., -1])
        safe = torch.where(remains, mass, 1.0)
        lse = safe.log() + top + _finite(self._log_scale)[:, None]
        return Partial(left[..., :-1] / safe[..., None], lse).masked(remains)

    @property
    def state_bytes(self) -> int:
        return tensor_bytes(self._state)

    def _fetched_terms(self, phi: Tensor, fetched: Fetched) -> Tensor:
        """Sums over the fetched tokens of a_i v_i and a_i with a_i = phi(q) . phi(k_i), [rows, R, Dv + 1]."""
        log_keys = self._features.log_keys(fetched.keys, fetched.row_ids) + fetched.log_valid()[..., None]
        keys = (log_keys - _finite(self._log_scale)[fetched.row_ids][:, None, None]).exp()
        a = phi[fetched.row_ids] @ keys.transpose(-1, -2)  # [F, R, S]
        terms = torch.cat([a @ fetched.values.float(), a.sum(-1, keepdim=True)], dim=-1)
        return terms.new_zeros(*phi.shape[:2], terms.shape[-1]).index_add_(0, fetched.row_ids, terms)

    def _tokens_left(self, fetched: Fetched) -> Tensor:
        return self._n_tokens.index_add(0, fetched.row_ids, fetched.log_valid().exp().sum(-1), alpha=-1)


def _finite(log_scale: Tensor) -> Tensor:
    return log_scale.masked_fill(log_scale.isneginf(), 0.0)
