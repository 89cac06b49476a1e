"""Positive feature maps for ``phi``: log features of queries and keys whose inner product stands for e^(q . k)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kvoffload.completion.base import per_query
from kvoffload.completion.calibrated import CalibrationFile, read_tensors, tensor_shapes
from kvoffload.geometry import Geometry

Family = Literal["exp", "hedgehog"]
FAMILIES: tuple[Family, ...] = ("exp", "hedgehog")


class FeatureMap(ABC):
    """log phi of scaled queries [..., D] and of keys [..., D], fp32; rows come first in every shape.

    The query heads of a row share K maps of the keys, K = 1 or R.
    """

    n_features: int
    n_key_maps: int = 1
    uses_anchor: bool = False

    def reset(self, anchor: Tensor) -> None:  # noqa: B027 - a learned map is what it is
        """A new prefill with mean scaled query ``anchor`` [rows, D]."""

    @abstractmethod
    def log_query(self, query: Tensor) -> Tensor:
        """query [rows * Q, R, D] to [rows * Q, R, m]."""

    @abstractmethod
    def log_keys(self, keys: Tensor, row_ids: Tensor) -> Tensor:
        """keys [F, S, D] of rows row_ids [F] to [F, K, S, m]."""


class RandomMap(FeatureMap):
    """FAVOR+ (Performer, arXiv:2009.14794, lemma 1) around the anchor: e^(q . k) = e^(q0 . k) e^((q - q0) . k), the
    first factor exact, the second by positive random features."""

    uses_anchor = True

    def __init__(self, n_features: int, seed: int, geometry: Geometry, device: torch.device) -> None:
        self.n_features = n_features
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(n_features, geometry.key_dim, generator=generator)
        self._directions = directions.to(device, non_blocking=True)  # re-anchoring makes a map between steps
        self._anchor = torch.zeros(geometry.rows, geometry.key_dim, device=device)

    def reset(self, anchor: Tensor) -> None:
        self._anchor = anchor

    def log_query(self, query: Tensor) -> Tensor:
        tilt = query - per_query(self._anchor, query)[:, None]
        size = tilt.square().sum(-1, keepdim=True) / 2
        return tilt @ self._directions.T - size - torch.tensor(self.n_features).log()

    def log_keys(self, keys: Tensor, row_ids: Tensor) -> Tensor:
        keys = keys.float()
        exact = torch.einsum("fd,fsd->fs", self._anchor[row_ids], keys)
        return (keys @ self._directions.T + (exact - keys.square().sum(-1) / 2)[..., None])[:, None]


def n_projections(family: Family, n_features: int) -> int:
    """Rows h of W for m features: hedgehog makes two features of each projection."""
    return n_features if family == "exp" else n_features // 2


def n_biases(family: Family, n_features: int) -> int:
    """Numbers that belong to the m features of one map beside W."""
    return n_features if family == "exp" else n_features // 2 + n_features


def log_features(family: Family, projected: Tensor, bias: Tensor) -> Tensor:
    """Log features of projections Wx [..., h] and biases.

    ``exp``: phi = exp(Wx + b), b [..., m]. ``hedgehog`` (arXiv:2402.04347, eq. 6, with learned scales since a softmax
    bounds the mass): phi = e^s [softmax(Wx + c), softmax(-Wx - c)], bias = [c, s] with c [..., h] and s [..., m].
    """
    if family == "exp":
        return projected + bias
    h = projected.shape[-1]
    x, scale = projected + bias[..., :h], bias[..., h:]
    return torch.cat([x.log_softmax(-1), (-x).log_softmax(-1)], dim=-1) + scale


@dataclass(frozen=True)
class MapWeights:
    """The maps of one layer, fp32: key.weight [G, K, h, D], key.bias [G, K, b], query.weight [G, R, h, D], query.bias
    [G, R, b]; h and b as the family says."""

    key_weight: Tensor
    key_bias: Tensor
    query_weight: Tensor
    query_bias: Tensor

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """Under the names that they have in a file."""
        mine = (self.key_weight, self.key_bias, self.query_weight, self.query_bias)
        return dict(zip(_names(layer), mine, strict=True))


class LearnedMap(FeatureMap):
    """phi of one layer's keys and queries by calibrated weights, the same ones for every sequence."""

    def __init__(self, family: Family, n_features: int, weights: MapWeights, n_sequences: int) -> None:
        self._family, self.n_features, self.n_key_maps = family, n_features, weights.key_weight.shape[1]
        parts = (weights.key_weight, weights.key_bias, weights.query_weight, weights.query_bias)
        tiled = [part if n_sequences == 1 else part.repeat(n_sequences, *[1] * (part.ndim - 1)) for part in parts]
        self._key_weight, self._key_bias, self._query_weight, self._query_bias = tiled

    def log_query(self, query: Tensor) -> Tensor:
        weight, bias = per_query(self._query_weight, query), per_query(self._query_bias, query)
        return log_features(self._family, (weight @ query[..., None])[..., 0], bias)

    def log_keys(self, keys: Tensor, row_ids: Tensor) -> Tensor:
        weight, bias = self._key_weight[row_ids], self._key_bias[row_ids]
        return log_features(self._family, keys.float()[:, None] @ weight.transpose(-1, -2), bias[:, :, None])


@dataclass(frozen=True)
class MapFile:
    """A calibrated file of maps whose header was checked: what they are made of."""

    file: Path
    family: Family
    n_features: int
    n_key_maps: int

    @staticmethod
    def check(found: CalibrationFile) -> "MapFile":
        """Raises ValueError unless every layer has maps of one family and size."""
        file, header = found.path, found.header
        family, n_features = header.options.get("family"), header.options.get("features")
        if family not in FAMILIES or type(n_features) is not int or not header.layers:
            raise ValueError(f"file {str(file)!r} names no family of features ({', '.join(FAMILIES)}) or no layers")
        shapes, h, b = tensor_shapes(file), n_projections(family, n_features), n_biases(family, n_features)
        sizes = [[shapes.get(name, ()) for name in _names(layer)] for layer in header.layers]
        for layer, (key, key_bias, query, query_bias) in zip(header.layers, sizes, strict=True):
            whole = key[2:3] == query[2:3] == (h,) and key[3:] == query[3:] and len(key) == 4
            if not whole or key_bias != (*key[:2], b) or query_bias != (*query[:2], b) or key[1] not in (1, query[1]):
                raise ValueError(f"file {str(file)!r} has no maps of {n_features} {family} features for layer {layer}")
        return MapFile(file, family, n_features, sizes[0][0][1])

    def load(self, layer: int, geometry: Geometry, device: torch.device) -> LearnedMap:
        """The maps of one layer; raises UsageError if they are made for other sizes."""
        heads, group, dim = geometry.n_kv_heads, geometry.group_size, geometry.key_dim
        h, b = n_projections(self.family, self.n_features), n_biases(self.family, self.n_features)
        shapes = ((heads, None, h, dim), (heads, None, b), (heads, group, h, dim), (heads, group, b))
        weights = read_tensors(self.file, dict(zip(_names(layer), shapes, strict=True)), device)
        return LearnedMap(self.family, self.n_features, MapWeights(*weights), geometry.n_sequences)


def _names(layer: int) -> tuple[str, ...]:
    return tuple(f"layers.{layer}.{side}.{part}" for side in ("key", "query") for part in ("weight", "bias"))
