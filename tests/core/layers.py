"""Whole layers over a store, and random tokens for them."""

import torch
from heads import CPU, geometry
from kvoffload_storage import FileStore, MemoryStore, StoreShape

from kvoffload.attention import prefill
from kvoffload.attention.build import build_layer
from kvoffload.attention.decode import decode
from kvoffload.attention.prefill import prepare
from kvoffload.cache.slots import Staging
from kvoffload.config import RuntimeConfig, pairs
from kvoffload.values import query_rows

PAGE = 4
PAIRS = pairs()


def new_layer(*given, **fields):
    return new_layers(1, *given, **fields)[0]


def new_layers(n, shape, tier="cpu", wrap=lambda store: store, **fields):
    """The layers of one cache."""
    settings = RuntimeConfig(**({"sinks": 4, "recent": 8, "page_size": PAGE, "budget": "20%"} | fields))
    sizes = StoreShape(n, shape.rows, shape.slice_bytes)
    store = wrap(FileStore(None, sizes, n_threads=2) if tier == "nvme" else MemoryStore(sizes, tier=tier))
    empty = torch.zeros(shape.rows, 0, shape.key_dim), torch.zeros(shape.rows, 0, shape.value_dim)
    staging = Staging(shape.slice_bytes, CPU)
    options = {"staging": staging, "keys": empty[0], "values": empty[1]}
    return [build_layer(settings, shape, store, i, model_layer=i, **options) for i in range(n)]


def tokens(shape, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(shape.rows, shape.group_size, n, shape.key_dim, generator=generator)
    return heads, *(torch.randn(shape.rows, n, d, generator=generator) for d in (shape.key_dim, shape.value_dim))


def take_in(layer, query, keys, values, padding=None):
    """Prefill at once, as the seam does."""
    layer.anchors.padding = padding
    prefill.take_in(layer, query, keys, values, whole=False)
    prepare(layer)
    layer.store.flush()  # what is still in memory counts as read from there


def step(layer, query, keys, values, run):
    """Decode the tokens of a slice in one forward: outputs and log-sum-exps side by side, [rows, R, Q, Dv + 1]."""
    part = decode(layer, query_rows(query[:, :, run]), keys[:, run], values[:, run])
    both = torch.cat([part.output, part.lse[..., None]], dim=-1)
    return both.unflatten(0, (layer.geometry.rows, -1)).transpose(1, 2)


__all__ = ["CPU", "PAGE", "PAIRS", "geometry", "new_layer", "new_layers", "step", "take_in", "tokens"]
