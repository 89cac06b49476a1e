"""Smooth streams of queries and keys for policies, and what pages they really attend to."""

import torch
from layers import new_layer, take_in
from torch import Tensor

from kvoffload.attention.decode import decode


def ar1(*size: int, rho: float, seed: int = 0, dim: int = 0) -> Tensor:
    """Unit variance, each step rho times the one before it along ``dim`` plus new noise."""
    noise = torch.randn(*size, generator=torch.Generator().manual_seed(seed)).transpose(0, dim)
    steps = [noise[0]]
    for new in noise[1:]:
        steps.append(rho * steps[-1] + (1 - rho**2) ** 0.5 * new)
    return torch.stack(steps).transpose(0, dim)


def stream(shape, n, *, rho=0.97, key_rho=0.0, seed=0):
    """Queries [rows, R, n, D], AR(1) along n, with keys [rows, n, D] and values [rows, n, Dv]."""
    query = ar1(n, shape.rows, shape.group_size, shape.key_dim, rho=rho, seed=seed).permute(1, 2, 0, 3)
    keys = ar1(n, shape.rows, shape.key_dim, rho=key_rho, seed=seed + 1).transpose(0, 1)
    values = torch.randn(shape.rows, n, shape.value_dim, generator=torch.Generator().manual_seed(seed + 2))
    return query, keys, values


def filled(shape, given, n_prompt, **fields):
    """A layer that holds the first ``n_prompt`` tokens of a stream."""
    layer = new_layer(shape, **fields)
    query, keys, values = given
    take_in(layer, query[:, :, :n_prompt], keys[:, :n_prompt], values[:, :n_prompt])
    return layer


def steps(layer, given, first, n):
    """Single steps of the tokens from ``first`` on; outputs and log-sum-exps [n, rows, R, Dv + 1]."""
    query, keys, values = given
    found = []
    for i in range(first, first + n):
        part = decode(layer, query[:, :, i], keys[:, i : i + 1], values[:, i : i + 1])
        found.append(torch.cat([part.output, part.lse[..., None]], -1))
    return torch.stack(found)


def watch_selections(layer):
    """The selections of the steps that follow, in order."""
    seen, choose = [], layer.chooser.choose

    def choose_and_note(*args):
        selection, scores = choose(*args)
        seen.append(selection)
        return selection, scores

    layer.chooser.choose = choose_and_note
    return seen


def pairs_of(selection) -> set[tuple[int, int]]:
    return set(zip(selection.row_ids.tolist(), selection.page_ids.tolist(), strict=True))


__all__ = ["ar1", "filled", "pairs_of", "steps", "stream", "watch_selections"]
