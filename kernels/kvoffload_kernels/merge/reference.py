"""Merging of partial attentions in the unnormalised domain (one normalisation, fp32)."""

import torch
from torch import Tensor


def merge(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two partials over disjoint keys: outputs [..., Dv], log-sum-exps [...], all fp32.

    A partial with lse = -inf contributes nothing and leaves the other one bit-identical; two of them give (0, -inf).
    """
    lse = torch.logaddexp(lse_a, lse_b)
    top = lse.masked_fill(lse.isneginf(), 0.0)
    return (lse_a - top).exp()[..., None] * output_a + (lse_b - top).exp()[..., None] * output_b, lse
