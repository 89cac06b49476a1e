"""Budgets by layer: how a step's reads are shared out over the layers, from what a calibration measured of each."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kvoffload.completion.calibrated import CalibrationFile, read_all, read_calibration

KIND = "layer_budgets"
LADDER = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Shares that a layer can get, as multiples of the mean: its floor, its cap and what lies between."""


def read_layer_budgets(file: Path) -> CalibrationFile:
    """The calibration in a file; raises ValueError if it is none of layer budgets."""
    found = read_calibration(file, KIND)
    tensors = read_all(file)
    if not tensors or any(t.shape != (len(LADDER),) or not bool(t.isfinite().all()) for t in tensors.values()):
        raise ValueError(f"file {str(file)!r} has no divergences of layers at {len(LADDER)} budgets")
    return found


def layer_shares(found: CalibrationFile) -> tuple[float, ...]:
    """The share of every offloaded layer, in order, as a multiple of the mean budget; their mean is at most 1."""
    tensors = read_all(found.path)
    return allocate(torch.stack([tensors[curve_name(layer)] for layer in sorted(found.header.layers)]))


def curve_name(layer: int) -> str:
    """The tensor of a layer: its divergence at each share of the ladder, nats, fp32 [len(LADDER)]."""
    return f"layers.{layer}.divergence"


def allocate(divergences: Tensor, ladder: Sequence[float] = LADDER) -> tuple[float, ...]:
    """Shares with a mean of at most 1 and the least sum of divergences [layers, len(ladder)], as if they added up:
    layers are lifted to the next corner of their curve's convex hull, the largest fall per share first."""
    lifts = []
    for layer, curve in enumerate(divergences.double().tolist()):
        step = 0
        while step < len(ladder) - 1:
            falls = [
                ((curve[step] - curve[to]) / (ladder[to] - ladder[step]), to) for to in range(step + 1, len(ladder))
            ]
            gain, step_to = max(falls)
            if gain <= 0:
                break
            lifts.append((gain, layer, step, step_to))
            step = step_to
    shares = [ladder[0]] * len(divergences)
    left = (1 - ladder[0]) * len(divergences)
    for _, layer, start, stop in sorted(lifts, reverse=True):
        if (cost := ladder[stop] - ladder[start]) <= left and shares[layer] == ladder[start]:
            shares[layer], left = ladder[stop], left - cost
    return tuple(shares)
