"""A sample of a finished prefill, for indexes that are fitted to it."""

import torch
from torch import Tensor

from kvoffload.attention.layer import LayerCache
from kvoffload.attention.stream import read_keys
from kvoffload.values import KeySample

_SAMPLE_TOKENS = 8192
_RUN_TOKENS = 256


def take_sample(layer: LayerCache, queries: Tensor, weights: Tensor, *, n_pages: int) -> KeySample:
    """Runs spread evenly over the first ``n_pages`` pages, ``_SAMPLE_TOKENS`` at most (read as prefill traffic), and
    the moment of its last queries [rows, R, T, D] with weights [rows, T]."""
    device = layer.anchors.keys.device
    run = max(_RUN_TOKENS // layer.geometry.page_size, 1)
    n_runs = max(min(n_pages // run, _SAMPLE_TOKENS // _RUN_TOKENS), 1)
    firsts = [i * n_pages // n_runs for i in range(n_runs)]
    keys, valid = read_keys(layer, [(first, min(run, n_pages - first)) for first in firsts])
    counted = queries.to(device).float() * layer.geometry.scale * weights.to(device)[:, None, :, None]
    moment = torch.einsum("grqd,grqe->gde", counted, counted) / queries.shape[1]
    n_queries = weights.to(device).sum(1).clamp_min(1)
    return KeySample(keys, valid, moment / n_queries[:, None, None])
