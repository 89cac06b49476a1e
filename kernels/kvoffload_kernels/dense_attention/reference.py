"""Partial attention of query rows over a contiguous run of keys, in plain torch."""

import torch
from torch import Tensor


def soft_cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Gemma 2's cap ``c tanh(z / c)``; the logits unchanged where softcap is None."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def weigh(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted values and their log-sum-exp: logits [..., Q, N] fp32 and values [..., N, Dv] to fp32
    ([..., Q, Dv], [..., Q]). A row whose logits are all -inf (or absent, N = 0) gives (0, -inf)."""
    if logits.shape[-1] == 0:
        return logits.new_zeros(*logits.shape[:-1], values.shape[-1]), logits.new_full(logits.shape[:-1], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    return weights @ values.float(), lse


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    causal: bool = False,
    valid: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query [rows, R, Q, D] over keys [rows, N, D] and values [rows, N, Dv]; fp32 ([rows, R, Q, Dv],
    [rows, R, Q]).

    ``causal`` needs Q = N (query i sees keys 0..i). ``valid`` is bool [rows, N]; a query that sees no key gives (0,
    -inf).
    """
    logits = soft_cap(torch.einsum("grqd,gnd->grqn", query.float() * scale, keys.float()), softcap)
    if causal:
        n = keys.shape[1]
        above = torch.ones(n, n, dtype=torch.bool, device=keys.device).triu(1)
        logits = logits.masked_fill(above, -torch.inf)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    return weigh(logits, values[:, None])
