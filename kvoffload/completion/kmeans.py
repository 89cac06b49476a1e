"""Spherical k-means over centred keys, as RetroInfer's published code clusters a segment (arXiv:2505.02922, "segmented
clustering"): starts are evenly spaced tokens, a token joins the centroid with the largest inner product, and centroids
are means scaled to length one."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clusters:
    """Where to look for a key's cluster: mean key [rows, 1, D] and directions [rows, M, D]."""

    centre: Tensor
    directions: Tensor

    def of_keys(self, keys: Tensor) -> Tensor:
        """The cluster of each key [rows, N, D], int64 [rows, N].

        In fp64, rounded to fp32 before the comparison: a key finds the same cluster in whatever company it comes.
        """
        likeness = (keys.double() - self.centre.double()) @ self.directions.double().mT
        return likeness.float().argmax(-1)

    def of_rows(self, row_ids: Tensor) -> "Clusters":
        return Clusters(self.centre[row_ids], self.directions[row_ids])


def spherical_k_means(keys: Tensor, valid: Tensor, n_clusters: int, iterations: int) -> Clusters:
    """Clusters of the keys fp32 [rows, N, D] that count in ``valid`` fp32 [rows, N], which are the last of each row.

    A start without a token of its own may keep none. The published code makes ``iterations`` - 1 such rounds, and the
    last one, which only assigns, is the caller's.
    """
    weight = valid[..., None]
    centre = (keys * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
    centred = (keys - centre) * weight
    directions = _gather(centred, _starts(valid, n_clusters))
    for _ in range(iterations - 1):
        nearest = (centred @ directions.mT).argmax(-1)
        sums = cluster_sums(centred, nearest, n_clusters)
        size = sums.norm(dim=-1, keepdim=True)
        directions = torch.where(size > 0, sums / size.clamp_min(torch.finfo(torch.float32).tiny), directions)
    return Clusters(centre, directions)


def cluster_sums(tokens: Tensor, cluster_ids: Tensor, n_clusters: int) -> Tensor:
    """Sum of the tokens [rows, N, C] of each cluster, [rows, M, C]."""
    rows, _, width = tokens.shape
    flat = cluster_ids + torch.arange(rows, device=tokens.device)[:, None] * n_clusters
    sums = tokens.new_zeros(rows * n_clusters, width)
    return sums.index_add_(0, flat.flatten(), tokens.flatten(0, 1)).view(rows, n_clusters, width)


def _starts(valid: Tensor, n_clusters: int) -> Tensor:
    """Evenly spaced tokens among those that count, int64 [rows, M]."""
    n_tokens, n_valid = valid.shape[1], valid.sum(1, keepdim=True)
    places = (torch.arange(n_clusters, device=valid.device) + 0.5) / n_clusters * n_valid
    return (n_tokens - n_valid + places).long().clamp(0, n_tokens - 1)


def _gather(tokens: Tensor, places: Tensor) -> Tensor:
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
