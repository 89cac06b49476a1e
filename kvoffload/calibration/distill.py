"""Distilling a positive feature map (arXiv:2604.05438) from one layer's examples: all heads in one optimisation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvoffload.calibration.examples import Example, head_losses
from kvoffload.completion.feature_maps import Family, LearnedMap, MapWeights, n_biases, n_projections
from kvoffload.completion.phi import PhiCompletion
from kvoffload.errors import KvoffloadError
from kvoffload.geometry import Geometry
from kvoffload.values import by_row

_BATCH = 4


@dataclass(frozen=True)
class MapOptions:
    """How a map looks and is trained: Adam from ``rate`` down a cosine, a few examples a step; ``maps_per_row`` of the
    keys, 1 or R."""

    family: Family
    features: int
    maps_per_row: int
    steps: int
    rate: float
    seed: int


def completion_of(weights: MapWeights, options: MapOptions, geometry: Geometry, device: torch.device) -> PhiCompletion:
    """The runtime's own completion with these weights."""
    return PhiCompletion(LearnedMap(options.family, options.features, weights, 1), geometry, device)


def distil(start: MapWeights, examples: Sequence[Example], geometry: Geometry, options: MapOptions) -> MapWeights:
    """The weights after training. The estimate, its subtraction included, is the one that decode steps make. Raises
    KvoffloadError if a loss is no number."""
    device = start.key_weight.device
    scaling = _Scaling.of(examples, geometry)
    deltas = [torch.zeros_like(t).requires_grad_() for t in vars(start).values()]
    adam = torch.optim.Adam(deltas, lr=options.rate)
    order = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        adam.param_groups[0]["lr"] = options.rate * (1 + math.cos(math.pi * step / options.steps)) / 2
        chosen = torch.randint(len(examples), (_BATCH,), generator=order).tolist()
        adam.zero_grad()
        for example in (examples[i] for i in chosen):
            completion = completion_of(scaling.apply(start, deltas), options, geometry, device)
            head_losses(example, example.estimate(completion)).sum().backward()
        adam.step()
    if not all(bool(delta.isfinite().all()) for delta in deltas):
        raise KvoffloadError(f"training diverged at a learning rate of {options.rate}: give a smaller one")
    return MapWeights(*(t.detach() for t in vars(scaling.apply(start, deltas)).values()))


@torch.no_grad()
def start_weights(examples: Sequence[Example], geometry: Geometry, options: MapOptions) -> MapWeights:
    """Untrained weights with a sense of the data: feature f is the tilted summary under one sampled query a_f,
    phi_k = e^(a_f . k) and phi_q = e^((q - a_f) . kbar_f) / m with kbar_f the mean key under a_f (to first order, and
    from below, the mass of the keys that kbar_f is the mean of). The hedgehog's projections are the same a_f and
    kbar_f. A head's mass is then matched to the examples'."""
    h = n_projections(options.family, options.features)
    sampled = _sample_queries(examples, geometry, options, h)  # [G, K, h, D]
    means = torch.stack([_mean_keys(sampled, example) for example in _runs(examples)]).mean(0)
    spread = geometry.group_size // options.maps_per_row
    n_rows, n_maps = sampled.shape[:2]
    key_bias = sampled.new_zeros(n_rows, n_maps, n_biases(options.family, options.features))
    query_bias = key_bias.clone()
    query_bias[..., :h] = -(sampled * means).sum(-1) - math.log(h)
    if options.family == "hedgehog":
        sampled, means = (t - t.mean(2, keepdim=True) for t in (sampled, means))
        query_bias.zero_()
    per_head = [t.repeat_interleave(spread, 1) for t in (means, query_bias)]
    weights = MapWeights(sampled, key_bias, per_head[0], per_head[1])
    return _matched(weights, examples, geometry, options)


def _sample_queries(examples: Sequence[Example], geometry: Geometry, options: MapOptions, n: int) -> Tensor:
    """Queries of each key map's heads, [G, K, n, D], drawn from all sequences."""
    rows, n_maps = geometry.rows, options.maps_per_row
    pools = [
        example.query.view(rows, -1, n_maps, geometry.group_size // n_maps, geometry.key_dim)
        .transpose(1, 2)
        .flatten(2, 3)
        for example in _runs(examples)
    ]
    pool = torch.cat(pools, dim=2)
    chosen = torch.randint(pool.shape[2], (n,), generator=torch.Generator().manual_seed(options.seed))
    return pool[:, :, chosen.to(pool.device)]


def _mean_keys(sampled: Tensor, example: Example) -> Tensor:
    """Mean key of the example's pages under each sampled query, [G, K, n, D]."""
    keys = example.pages.keys.flatten(1, 2).float()[:, None]
    return (sampled @ keys.transpose(-1, -2)).softmax(-1) @ keys


def _matched(weights: MapWeights, examples: Sequence[Example], geometry: Geometry, options: MapOptions) -> MapWeights:
    """The same maps with each query head's log mass moved by its median error."""
    completion = completion_of(weights, options, geometry, weights.key_weight.device)
    errors = [example.log_mass_errors(example.estimate(completion)) for example in examples]
    offset = torch.cat(errors, dim=-1).median(-1).values[..., None]  # [G, R, 1]
    bias = weights.query_bias.clone()
    bias[..., -options.features :] -= offset
    return MapWeights(weights.key_weight, weights.key_bias, weights.query_weight, bias)


def _runs(examples: Sequence[Example]) -> list[Example]:
    """One example of each run of queries."""
    return list({id(example.pages): example for example in examples}.values())


@dataclass(frozen=True)
class _Scaling:
    """Means and deviations of keys and queries: steps are taken for inputs of mean 0 and deviation 1, which makes one
    learning rate fit every head and channel."""

    keys: tuple[Tensor, Tensor]  # [G, 1, 1, D] each
    queries: tuple[Tensor, Tensor]  # [G, R, 1, D] each

    @staticmethod
    def of(examples: Sequence[Example], geometry: Geometry) -> "_Scaling":
        runs = _runs(examples)
        keys = torch.cat([e.pages.keys.flatten(1, 2).float() for e in runs], dim=1)[:, None]
        queries = [by_row(e.query, geometry.rows).unflatten(1, (-1, geometry.group_size)) for e in runs]
        heads = torch.cat(queries, dim=1).transpose(1, 2)
        return _Scaling(_moments(keys), _moments(heads))

    def apply(self, start: MapWeights, deltas: Sequence[Tensor]) -> MapWeights:
        """The start moved by deltas of the scaled inputs' weights."""
        key_weight, key_bias = _moved(start.key_weight, start.key_bias, deltas[0], deltas[1], self.keys)
        query_weight, query_bias = _moved(start.query_weight, start.query_bias, deltas[2], deltas[3], self.queries)
        return MapWeights(key_weight, key_bias, query_weight, query_bias)


def _moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    return inputs.mean(2, keepdim=True), inputs.std(2, keepdim=True).clamp_min(1e-3)


def _moved(
    weight: Tensor, bias: Tensor, weight_delta: Tensor, bias_delta: Tensor, moments: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    mean, deviation = moments
    step = weight_delta / deviation
    shift = torch.nn.functional.pad((step * mean).sum(-1), (0, bias.shape[-1] - weight.shape[-2]))
    return weight + step, bias + bias_delta - shift
