"""Merging of partial attentions in the unnormalised domain (one normalisation, fp32)."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def merge(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two partials over disjoint keys: outputs [..., Dv], log-sum-exps [...], all fp32.

    A partial with lse = -inf contributes nothing and leaves the other one bit-identical; two of them give (0, -inf).
    """
    lse = torch.logaddexp(lse_a, lse_b)
    top = lse.masked_fill(lse.isneginf(), 0.0)
    return (lse_a - top).exp()[..., None] * output_a + (lse_b - top).exp()[..., None] * output_b, lse


def merge_parts(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All of several partials over disjoint key sets in one: outputs [..., Dv] and log-sum-exps [...] each, fp32."""
    return reduce(lambda a, b: merge(*a, *b), zip(outputs, lses, strict=True))


def merge_splits(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Partials along dimension 1 in one: [rows, n, H, Dv] and [rows, n, H] to [rows, H, Dv] and [rows, H], fp32."""
    lse = lses.logsumexp(1)
    weights = (lses - lse.masked_fill(lse.isneginf(), 0.0)[:, None]).exp()
    return torch.einsum("gnh,gnhd->ghd", weights, outputs), lse
