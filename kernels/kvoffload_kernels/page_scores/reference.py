"""A token-level index of keys at 1, 2 or 4 bits a channel: packing, and scoring straight from the packed codes.

Per-channel asymmetric quantisation over groups of consecutive tokens, as KIVI (arXiv:2402.02750) does for keys.
Byte j of a token's D * bits / 8 bytes holds channels j, j + D', j + 2 D', ... with D' = D * bits / 8, lowest bits
first.
"""

import torch
from torch import Tensor

from kvoffload_kernels.dense_attention.reference import soft_cap, weigh


def quantise(keys: Tensor, valid: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, zero points and steps of keys [..., T, D], one group along T: uint8 [..., T, D * bits / 8], fp16 [...,
    D] x 2.

    A key is restored as ``zero + code * step``. ``valid`` bool [..., T] (or of one row for all) keeps tokens out of the
    statistics.
    """
    x = keys.float()
    mask = torch.ones_like(x[..., :1], dtype=torch.bool) if valid is None else valid[..., None]
    zero, step = _one_bit(x, mask) if bits == 1 else _uniform(x, mask, bits)
    zero, step = zero.half(), step.clamp_min(1e-7).half()
    codes = ((x - zero.float()[..., None, :]) / step.float()[..., None, :]).round()  # 1e-7 is no zero in fp16
    return _pack(codes.nan_to_num(0.0).clamp(0, 2**bits - 1).to(torch.uint8), bits), zero, step


def _one_bit(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    count = mask.sum(-2).clamp_min(1)
    centre = (x * mask).sum(-2) / count
    spread = ((x - centre[..., None, :]).abs() * mask).sum(-2) / count
    return centre - spread, 2 * spread


def _uniform(x: Tensor, mask: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    outside = ~mask
    low, high = x.masked_fill(outside, torch.inf).amin(-2), x.masked_fill(outside, -torch.inf).amax(-2)
    nothing = outside.all(-2)
    low, high = low.masked_fill(nothing, 0.0), high.masked_fill(nothing, 0.0)
    if bits == 2:  # cell centres: the extremes are rare, so half a cell inside them is nearer to most keys
        step = (high - low) / 4
        return low + step / 2, step
    return low, (high - low) / (2**bits - 1)


def _pack(codes: Tensor, bits: int) -> Tensor:
    packed, *planes = codes.chunk(8 // bits, dim=-1)
    for i, plane in enumerate(planes, 1):
        packed = packed | plane << (i * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes [..., D] uint8 of packed bytes [..., D * bits / 8]."""
    mask = 2**bits - 1
    return torch.cat([(packed >> (i * bits)) & mask for i in range(8 // bits)], dim=-1)


def restore(codes: Tensor, zero: Tensor, step: Tensor, bits: int) -> Tensor:
    """Approximate keys fp32 [..., T, D] of codes [..., T, D * bits / 8] with zero and step fp16 [..., D]."""
    return zero.float()[..., None, :] + unpack(codes, bits).float() * step.float()[..., None, :]


def score_tokens(query: Tensor, codes: Tensor, zero: Tensor, step: Tensor, bits: int) -> Tensor:
    """Approximate logits of every indexed token: query [rows, R, D] fp32 (scaled), codes [rows, N, T, D * bits / 8],
    zero and step fp16 [rows, N, D] for N groups of T tokens; returns fp32 [rows, R, N * T]."""
    rows, group, _ = query.shape
    n_groups, n_tokens = codes.shape[1:3]
    stepped = query[:, None] * step.float()[:, :, None]  # [rows, N, R, D]
    base = torch.einsum("grd,gnd->gnr", query, zero.float())
    logits = stepped @ unpack(codes, bits).to(query.dtype).transpose(-1, -2) + base[..., None]
    return logits.permute(0, 2, 1, 3).reshape(rows, group, n_groups * n_tokens)


def mask_tokens(logits: Tensor, missing: Tensor | None) -> Tensor:
    """Logits [rows, H, N] with -inf at the first ``missing`` int64 [rows] tokens of each row (None: nowhere)."""
    if missing is None:
        return logits
    tokens = torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(tokens < missing[:, None, None], -torch.inf)


def mask_pages(logits: Tensor, excluded: Tensor, page_size: int) -> Tensor:
    """Logits [rows, Q * R, N] with -inf at the pages that ``excluded`` bool [rows * Q, P] names for each query."""
    rows, n_heads, n_tokens = logits.shape
    pages = logits.reshape(excluded.shape[0], -1, n_tokens // page_size, page_size)
    return pages.masked_fill(excluded[:, None, :, None], -torch.inf).reshape(rows, n_heads, n_tokens)


def page_masses(logits: Tensor, page_size: int) -> Tensor:
    """Log-sum-exp of every page's logits: [rows, H, N] to fp32 [rows, H, P]."""
    masses: Tensor = logits.unflatten(-1, (-1, page_size)).logsumexp(-1)
    return masses


def score_pages(
    query: Tensor,
    codes: Tensor,
    zero: Tensor,
    step: Tensor,
    bits: int,
    *,
    n_tokens: int,
    page_size: int,
    missing: Tensor | None = None,
    newest: Tensor | None = None,
) -> Tensor:
    """Log masses of all pages, fp32 [rows, H, n_tokens / page_size], from arguments as of ``score_tokens``; tokens
    behind the first ``n_tokens`` are none, nor are the first ``missing`` int64 [rows] ones and pages behind the
    ``newest`` int64 [1] (-inf)."""
    logits = score_tokens(query, codes, zero, step, bits)[..., :n_tokens]
    return mask_behind(page_masses(mask_tokens(logits, missing), page_size), newest)


def mask_behind(masses: Tensor, newest: Tensor | None) -> Tensor:
    """Log masses of pages [rows, H, P] with -inf behind the ``newest`` int64 [1]."""
    if newest is None:
        return masses
    return masses.masked_fill(torch.arange(masses.shape[-1], device=masses.device) > newest, -torch.inf)


def attend_index(
    query: Tensor,
    codes: Tensor,
    zero: Tensor,
    step: Tensor,
    bits: int,
    *,
    excluded: Tensor,
    page_size: int,
    missing: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the restored keys themselves, of the pages that are not excluded: mean key and log-sum-exp, fp32
    ([rows, H, D], [rows, H]); (0, -inf) where nothing is left.

    The H = Q * R query heads of a row are R of each of its Q queries; ``excluded`` is bool [rows * Q, P], and there are
    P pages of tokens. The rest is as in ``score_pages``.
    """
    n_tokens = excluded.shape[-1] * page_size
    logits = soft_cap(score_tokens(query, codes, zero, step, bits)[..., :n_tokens], softcap)
    logits = mask_pages(mask_tokens(logits, missing), excluded, page_size)
    return weigh(logits, restore(codes, zero, step, bits).flatten(1, 2)[:, :n_tokens])
