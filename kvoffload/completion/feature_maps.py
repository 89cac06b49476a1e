"""Positive feature maps for ``phi``: log features of queries and keys whose inner product stands for e^(q . k)."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from kvoffload.geometry import Geometry


class FeatureMap(ABC):
    """log phi of scaled queries [..., D] and of keys [..., D], fp32; rows come first in every shape."""

    n_features: int

    def reset(self, anchor: Tensor) -> None:  # noqa: B027 - a learned map is what it is
        """A new prefill with mean scaled query ``anchor`` [rows, D]."""

    @abstractmethod
    def log_query(self, query: Tensor) -> Tensor:
        """query [rows, R, D] to [rows, R, m]."""

    @abstractmethod
    def log_keys(self, keys: Tensor, row_ids: Tensor) -> Tensor:
        """keys [F, S, D] of rows row_ids [F] to [F, S, m]."""


class RandomMap(FeatureMap):
    """FAVOR+ (Performer, arXiv:2009.14794, lemma 1) around the anchor: e^(q . k) = e^(q0 . k) e^((q - q0) . k), the
    first factor exact, the second by positive random features."""

    def __init__(self, n_features: int, seed: int, geometry: Geometry, device: torch.device) -> None:
        self.n_features = n_features
        generator = torch.Generator().manual_seed(seed)
        self._directions = torch.randn(n_features, geometry.key_dim, generator=generator).to(device)
        self._anchor = torch.zeros(geometry.rows, geometry.key_dim, device=device)

    def reset(self, anchor: Tensor) -> None:
        self._anchor = anchor

    def log_query(self, query: Tensor) -> Tensor:
        tilt = query - self._anchor[:, None]
        size = tilt.square().sum(-1, keepdim=True) / 2
        return tilt @ self._directions.T - size - torch.tensor(self.n_features).log()

    def log_keys(self, keys: Tensor, row_ids: Tensor) -> Tensor:
        keys = keys.float()
        exact = torch.einsum("fd,fsd->fs", self._anchor[row_ids], keys)
        return keys @ self._directions.T + (exact - keys.square().sum(-1) / 2)[..., None]


class LearnedMap(FeatureMap):
    """phi(x) = exp(W x + b) per layer and head, read from a safetensors file: ``layers.I.key.weight`` [G, m, D],
    ``layers.I.key.bias`` [G, m], ``layers.I.query.weight`` [G, R, m, D], ``layers.I.query.bias`` [G, R, m]."""

    def __init__(self, file: Path, layer: int, geometry: Geometry, device: torch.device) -> None:
        with safe_open(file, framework="pt") as tensors:
            names = (f"layers.{layer}.{side}.{part}" for side in ("key", "query") for part in ("weight", "bias"))
            read = [tensors.get_tensor(name).float().to(device) for name in names]
        tiled: list[Tensor] = [t.repeat(geometry.n_sequences, *[1] * (t.ndim - 1)) for t in read]
        self._key_weight, self._key_bias, self._query_weight, self._query_bias = tiled
        self.n_features = self._key_bias.shape[-1]

    @staticmethod
    def n_features_of(file: Path) -> int:
        """Features of the maps in a file, from its header."""
        with safe_open(file, framework="pt") as tensors:
            name = next(name for name in tensors.keys() if name.endswith("key.bias"))  # noqa: SIM118 - not a dict
            return int(tensors.get_slice(name).get_shape()[-1])

    def log_query(self, query: Tensor) -> Tensor:
        return (self._query_weight @ query[..., None])[..., 0] + self._query_bias

    def log_keys(self, keys: Tensor, row_ids: Tensor) -> Tensor:
        weight, bias = self._key_weight[row_ids], self._key_bias[row_ids]
        return keys.float() @ weight.transpose(-1, -2) + bias[:, None]
