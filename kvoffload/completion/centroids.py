"""``centroids``: RetroInfer's estimation zone (arXiv:2505.02922): clusters of keys with mass n_j e^(q . c_j) and
the sum of their values as numerator.

The original retrieves clusters; here pages are retrieved, and each fetched token is taken out of its cluster's count,
mean key and value sum. Its segments are 8K tokens, here a run of pages that comes at once (a prefill block) and at most
that; and what it keeps exact until 1,024 generated tokens are clustered is here one cluster a sealed page. Clusters
are fp32, the original's are in the KV's dtype.
"""

import math
from abc import abstractmethod
from typing import Literal

import torch
from kvoffload_kernels.completion.reference import remove_slices
from pydantic import Field
from torch import Tensor

from kvoffload.buffers import Growing, tensor_bytes
from kvoffload.completion.base import Completion, CompletionConfigBase, per_query
from kvoffload.completion.kmeans import Clusters, cluster_sums, spherical_k_means
from kvoffload.errors import UsageError
from kvoffload.geometry import Geometry
from kvoffload.values import Fetched, Pages, Partial

_SEGMENT_TOKENS = 8192
_MAX_CLUSTERS = 2**16  # what two bytes tell apart


class CentroidsCompletionConfig(CompletionConfigBase):
    """One cluster for ``tokens_per_cluster`` tokens, or a fixed number of ``clusters``; ``share`` of the clusters is
    estimated and the rest dropped (the original: 0.232)."""

    kind: Literal["centroids"] = "centroids"
    tokens_per_cluster: int = Field(16, ge=1)
    clusters: int | None = Field(None, ge=1, le=4096)
    iterations: int = Field(10, ge=1, le=1000)
    share: float = Field(1.0, gt=0, le=1)

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        if self.clusters is not None:
            return FixedCentroids(self.clusters, self.iterations, self.share, geometry, device)
        return GrowingCentroids(self.tokens_per_cluster, self.iterations, self.share, geometry, device)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        if self.clusters is not None:
            return (self.clusters * (1 + 2 * key_dim + value_dim) + key_dim) * 4
        return _n_clusters(n_tokens, self.tokens_per_cluster) * (1 + key_dim + value_dim) * 4 + n_tokens * 2


class _Centroids(Completion):
    """Counts, key sums and value sums of clusters, fp32 [rows, M, 1 + D + Dv]."""

    def __init__(self, iterations: int, share: float, geometry: Geometry, device: torch.device) -> None:
        self._iterations, self._share, self._geometry, self._device = iterations, share, geometry, device
        self.reset(torch.empty(0))

    def estimate(self, query: Tensor, fetched: Fetched, scores: Tensor) -> Partial:
        if scores.shape[-1] == 0:
            return Partial.empty(query, self._geometry.value_dim)
        left = self._without(fetched, query)
        counts = left[..., 0]
        has_tokens = (counts > 0.5) & (counts.sum(-1, keepdim=True) > 0.5)
        safe = torch.where(has_tokens, counts, 1.0)
        keys, values = (left[..., 1:] / safe[..., None]).split([self._geometry.key_dim, self._geometry.value_dim], -1)
        logits = (query @ keys.mT).masked_fill(~has_tokens[:, None], -torch.inf)
        if self._share < 1:
            logits = logits.masked_fill(~self._estimated(logits)[:, None], -torch.inf)
        return Partial.weigh(logits + safe.log()[:, None], values.masked_fill(~has_tokens[..., None], 0.0))

    @abstractmethod
    def _sums(self) -> Tensor: ...

    @abstractmethod
    def _clusters_of(self, fetched: Fetched, rows: Tensor) -> Tensor:
        """The clusters of the fetched tokens of ``rows`` [F], int64 [F, S]."""

    def _without(self, fetched: Fetched, query: Tensor) -> Tensor:
        """The clusters without the fetched tokens, [rows * Q, M, 1 + D + Dv]."""
        sums = self._sums()
        n_queries = query.shape[0] // sums.shape[0]
        cluster_ids = self._clusters_of(fetched, fetched.row_ids // n_queries)
        tokens = _tokens(fetched.keys, fetched.values, fetched.log_valid())
        row_ids = fetched.row_ids[:, None].expand_as(cluster_ids)
        return remove_slices(per_query(sums, query), tokens.flatten(0, 1), row_ids.flatten(), cluster_ids.flatten())

    def _estimated(self, logits: Tensor) -> Tensor:
        """Which clusters are not dropped, bool [rows * Q, M]: those with the largest softmax of q . c (without their
        counts), summed over a group's heads."""
        shares = logits.softmax(-1).nan_to_num(0.0).sum(1)
        chosen = shares.topk(math.ceil(self._share * shares.shape[-1]), dim=-1, sorted=False).indices
        return torch.zeros_like(shares, dtype=torch.bool).scatter_(-1, chosen, True)


class GrowingCentroids(_Centroids):
    """New clusters for every run of pages; each token's cluster is kept in two bytes."""

    def __init__(
        self, tokens_per_cluster: int, iterations: int, share: float, geometry: Geometry, device: torch.device
    ) -> None:
        self._tokens_per_cluster = tokens_per_cluster
        super().__init__(iterations, share, geometry, device)

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        self._clusters, self._cluster_ids = Growing(), Growing()

    def absorb(self, pages: Pages) -> None:
        length = max(_SEGMENT_TOKENS // self._geometry.page_size, 1)
        for start in range(0, pages.n_pages, length):
            self._absorb_segment(pages.run(start, min(start + length, pages.n_pages)))

    @property
    def state_bytes(self) -> int:
        return self._clusters.used_bytes + self._cluster_ids.used_bytes

    def _sums(self) -> Tensor:
        return self._clusters.view

    def _clusters_of(self, fetched: Fetched, rows: Tensor) -> Tensor:
        return self._cluster_ids.view[rows, fetched.page_ids].long() + _MAX_CLUSTERS // 2

    def _absorb_segment(self, pages: Pages) -> None:
        first, (n_pages, page_size) = len(self._clusters), pages.keys.shape[1:3]
        n_clusters = _n_clusters(n_pages * page_size, self._tokens_per_cluster)
        if first + n_clusters > _MAX_CLUSTERS:
            raise UsageError(
                f"centroids keeps at most {_MAX_CLUSTERS} clusters: give more than "
                f"tokens_per_cluster={self._tokens_per_cluster} for contexts this long"
            )
        keys, log_valid = pages.keys.flatten(1, 2), pages.log_valid().flatten(1)
        clusters = spherical_k_means(keys.float(), log_valid.exp(), n_clusters, self._iterations)
        cluster_ids = clusters.of_keys(keys)
        self._clusters.append(
            cluster_sums(_tokens(keys, pages.values.flatten(1, 2), log_valid), cluster_ids, n_clusters)
        )
        stored = (cluster_ids + (first - _MAX_CLUSTERS // 2)).to(torch.int16)
        self._cluster_ids.append(stored.unflatten(1, (n_pages, page_size)))


class FixedCentroids(_Centroids):
    """A number of clusters that does not grow (not in the paper): found in the first run of pages with tokens that
    count; every token, then and later, joins by the same frozen directions, so that a fetched key finds its cluster
    again."""

    def __init__(
        self, n_clusters: int, iterations: int, share: float, geometry: Geometry, device: torch.device
    ) -> None:
        self._n_clusters = n_clusters
        super().__init__(iterations, share, geometry, device)

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        rows, key_dim = self._geometry.rows, self._geometry.key_dim
        self._state = torch.zeros(rows, self._n_clusters, 1 + key_dim + self._geometry.value_dim, device=self._device)
        self._routing = Clusters(
            torch.zeros(rows, 1, key_dim, device=self._device),
            torch.zeros(rows, self._n_clusters, key_dim, device=self._device),
        )
        self._found = False

    def absorb(self, pages: Pages) -> None:
        keys, log_valid = pages.keys.flatten(1, 2), pages.log_valid().flatten(1)
        if not self._found or (pages.valid is not None and pages.n_pages > 1):  # a row may begin with a run of padding
            self._find(keys.float(), log_valid.exp())
        tokens = _tokens(keys, pages.values.flatten(1, 2), log_valid)
        self._state += cluster_sums(tokens, self._routing.of_keys(keys), self._n_clusters)

    @property
    def state_bytes(self) -> int:
        return tensor_bytes(self._state, self._routing.centre, self._routing.directions)

    def _sums(self) -> Tensor:
        return self._state

    def _clusters_of(self, fetched: Fetched, rows: Tensor) -> Tensor:
        return self._routing.of_rows(rows).of_keys(fetched.keys)

    def _find(self, keys: Tensor, valid: Tensor) -> None:
        """Clusters for the rows that have no token yet."""
        found = spherical_k_means(keys, valid, self._n_clusters, self._iterations)
        empty = (self._state[..., 0].sum(-1) < 0.5)[:, None, None]
        self._routing = Clusters(
            torch.where(empty, found.centre, self._routing.centre),
            torch.where(empty, found.directions, self._routing.directions),
        )
        self._found = True


def _n_clusters(n_tokens: int, tokens_per_cluster: int) -> int:
    return max(round(n_tokens / tokens_per_cluster), 1)


def _tokens(keys: Tensor, values: Tensor, log_valid: Tensor) -> Tensor:
    """(1, k, v) of each token that counts and zeros for the others, fp32 [..., 1 + D + Dv]."""
    ones = torch.ones_like(keys[..., :1], dtype=torch.float32)
    return torch.cat([ones, keys.float(), values.float()], dim=-1) * log_valid.exp()[..., None]
