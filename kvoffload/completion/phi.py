"""``phi``: the fixed-size linear-attention completion of arXiv:2604.05438 (kernels/README.md, "Completion").

Per row u = sum phi(k_j) and S = sum phi(k_j) v_j over all sealed tokens; the fetched tokens' phi(q) . phi(k_i) are
recomputed from their keys and removed from numerator and denominator; no outer product is formed for them.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kvoffload.buffers import tensor_bytes
from kvoffload.completion.base import Completion, CompletionConfigBase, per_query
from kvoffload.completion.calibrated import CalibrationFile, read_calibration
from kvoffload.completion.feature_maps import FeatureMap, MapFile, RandomMap
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial

_EMPTY = 1e-5  # a remainder below this share of the summary is rounding: fp32 sums over all fetched tokens


class PhiCompletionConfig(CompletionConfigBase):
    """``features`` random positive features, or the calibrated maps in ``file`` (which say how many they are)."""

    kind: Literal["phi"] = "phi"
    features: int = Field(64, ge=1, le=65536)
    seed: int = 0
    file: Path | None = None

    @model_validator(mode="after")
    def _file_has_maps(self) -> "PhiCompletionConfig":
        if self.file is not None:
            MapFile.check(read_calibration(self.file, "phi"))
        return self

    @property
    def calibration(self) -> CalibrationFile | None:
        return None if self.file is None else read_calibration(self.file, "phi")

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        maps = self._maps()
        if maps is not None:
            return PhiCompletion(maps.load(layer, geometry, device), geometry, device)
        return PhiCompletion(RandomMap(self.features, self.seed + layer, geometry, device), geometry, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        maps = self._maps()
        n_features = self.features if maps is None else maps.n_features * maps.n_key_maps
        return n_features * (value_dim + 2) * 4

    def _maps(self) -> MapFile | None:
        return None if self.calibration is None else MapFile.check(self.calibration)


class PhiCompletion(Completion):
    """The state of each feature is kept relative to its largest log value so far (``_log_scale``), which leaves room
    for e^60 and more. Gradients flow from ``estimate`` through one ``absorb`` after a ``reset`` to the map."""

    def __init__(self, features: FeatureMap, geometry: Geometry, device: torch.device) -> None:
        self._features, self._geometry, self._device = features, geometry, device
        self.uses_anchor = features.uses_anchor
        self.reset(torch.zeros(geometry.rows, geometry.key_dim, device=device))

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        self._features.reset(anchor)
        maps = (self._geometry.rows, self._features.n_key_maps, self._features.n_features)
        self._state = torch.zeros(*maps, self._geometry.value_dim + 1, device=self._device)  # S and u side by side
        self._log_scale = torch.full(maps, -torch.inf, device=self._device)
        self._n_tokens = torch.zeros(maps[0], device=self._device)

    def absorb(self, pages: Pages) -> None:
        rows = pages.keys.shape[0]
        keys, values = pages.keys.flatten(1, 2), pages.values.flatten(1, 2).float()
        log_phi = self._features.log_keys(keys, torch.arange(rows, device=self._device))
        log_phi = log_phi + pages.log_valid().flatten(1)[:, None, :, None]
        log_scale = torch.maximum(self._log_scale, log_phi.detach().amax(2))
        self._state *= (self._log_scale - _finite(log_scale)).exp()[..., None]
        self._log_scale = log_scale
        phi = (log_phi - _finite(log_scale)[:, :, None]).exp().transpose(-1, -2)
        self._state += phi @ torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)[:, None]
        self._n_tokens += pages.counts().sum(-1)

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        log_phi = self._features.log_query(query)
        scaled = self._by_map(log_phi) + per_query(_finite(self._log_scale), query)[:, :, None]
        log_phi = scaled.flatten(1, 2)  # [rows * Q, R, m]
        top = log_phi.detach().amax(-1)
        phi = (log_phi - top[..., None]).exp()
        total = self._total(phi)
        left = total - self._fetched_terms(phi, fetched)
        mass = left[..., -1]
        remains = (self._tokens_left(query, fetched) > 0.5)[:, None] & (mass > _EMPTY * total[..., -1])
        safe = torch.where(remains, mass, 1.0)
        return Partial(left[..., :-1] / safe[..., None], safe.log() + top).masked(remains)

    @property
    def state_bytes(self) -> int:
        return tensor_bytes(self._state, self._log_scale)

    def _by_map(self, heads: Tensor) -> Tensor:
        """[n, R, ...] with the query heads of each key map side by side, [n, K, R / K, ...]."""
        n_maps = self._features.n_key_maps
        return heads.view(heads.shape[0], n_maps, heads.shape[1] // n_maps, *heads.shape[2:])

    def _total(self, phi: Tensor) -> Tensor:
        """phi . S and phi . u over all tokens: [rows * Q, R, m] to [rows * Q, R, Dv + 1]."""
        rows, n_maps = self._state.shape[:2]
        heads = phi.view(rows, -1, n_maps, phi.shape[1] // n_maps, phi.shape[-1]).transpose(1, 2)
        total = heads.flatten(2, 3) @ self._state  # [rows, K, Q * R / K, Dv + 1]
        return total.view(*heads.shape[:-1], -1).transpose(1, 2).reshape(*phi.shape[:2], -1)

    def _fetched_terms(self, phi: Tensor, fetched: Fetched) -> Tensor:
        """Sums over the fetched tokens of a_i v_i and a_i with a_i = phi(q) . phi(k_i), [rows * Q, R, Dv + 1]."""
        rows = fetched.row_ids // (phi.shape[0] // self._state.shape[0])
        log_keys = self._features.log_keys(fetched.keys, rows) + fetched.log_valid()[:, None, :, None]
        keys = (log_keys - _finite(self._log_scale)[rows][:, :, None]).exp()
        a = (self._by_map(phi[fetched.row_ids]) @ keys.transpose(-1, -2)).flatten(1, 2)  # [F, R, S]
        terms = torch.cat([a @ fetched.values.float(), a.sum(-1, keepdim=True)], dim=-1)
        return terms.new_zeros(*phi.shape[:2], terms.shape[-1]).index_add(0, fetched.row_ids, terms)

    def _tokens_left(self, query: Tensor, fetched: Fetched) -> Tensor:
        return per_query(self._n_tokens, query).index_add(
            0, fetched.row_ids, fetched.log_valid().exp().sum(-1), alpha=-1
        )


def _finite(log_scale: Tensor) -> Tensor:
    return log_scale.masked_fill(log_scale.isneginf(), 0.0)
