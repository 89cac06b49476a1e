"""Transform coding of keys (kernels/README.md, "Transform-coded keys"): a linear transform fitted to second moments,
and channels at 4, 2, 1 or 0 bits in the order of their variance, each with levels of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from torch import Tensor

from kvoffload_kernels.dense_attention.reference import soft_cap, weigh
from kvoffload_kernels.page_scores.reference import mask_behind, mask_pages, mask_tokens, page_masses

_SHRINK = 0.3  # of the query moment towards a multiple of the identity
_RIDGE = 1e-3  # of the key covariance
_TIERS = {
    0.25: (0, 0, 2),
    0.5: (0, 1, 2),
    1.0: (1, 1, 2),
    1.5: (1, 3, 2),
    2.0: (2, 3, 2),
    2.25: (2, 4, 2),
    2.5: (3, 3, 2),
}  # eighths of the channels
_BITS = (4, 2, 1)

_LLOYD_STEPS = 4
_LANES = 8  # places that each sum is spread over, so that additions wait less for each other
_LLOYD_TOKENS = 4096  # of the sample, evenly spread

# Lloyd-Max quantisers of a standard normal variable (J. Max, IRE Trans. Inf. Theory 6(1), 1960, table I), the positive
# levels: where the fit of the levels begins.
_POSITIVE = {
    1: (0.7979,),
    2: (0.4528, 1.510),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}
BITS = tuple(_TIERS)


def tier_widths(bits: float, n_channels: int) -> tuple[int, int, int]:
    """How many channels have 4, 2 and 1 bits at an average of ``bits``; the others have none. Raises ValueError for an
    unknown average."""
    if bits not in _TIERS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, not {bits}")
    fours, twos, ones = (n_channels * eighths // 8 for eighths in _TIERS[bits])
    return fours, twos, ones


def code_bytes(widths: tuple[int, int, int]) -> int:
    """Bytes of one token's codes."""
    return sum(-(-width * bits // 8) for width, bits in zip(widths, _BITS, strict=True))


def n_levels(widths: tuple[int, int, int]) -> int:
    """Levels of all channels together."""
    return sum(width * 2**bits for width, bits in zip(widths, _BITS, strict=True))


def fit(covariance: Tensor, query_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Analysis and synthesis matrices fp32 [rows, D, D] for keys of ``covariance`` and queries of second moment
    ``query_moment``, fp32 [rows, D, D] both.

    With M = L L^T the (shrunken) query moment, an error e of a key costs e^T M e on average; so L^T k is diagonalised
    and its principal channels are scaled to unit variance, largest first: c = (k - mean) A, k = mean + c S^T.

    Worked out on the host: a GPU diagonalises matrices of this size one after another, several times more slowly
    (pytorch/pytorch#174674). On one thread of it: matrices are so small that several wait for each other.
    """
    device = covariance.device
    with _one_thread():
        found = _fit(query_moment.double().cpu(), covariance.double().cpu())
    analysis, synthesis = (t.float().to(device) for t in found)
    return analysis, synthesis


def _fit(query_moment: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    size = covariance.shape[-1]
    root = torch.linalg.cholesky_ex(_shrunken(query_moment, _SHRINK)).L
    variance, axes = torch.linalg.eigh(root.mT @ _ridged(covariance, _RIDGE) @ root)
    variance, axes = variance.flip(-1).clamp_min(torch.finfo(torch.float64).tiny), axes.flip(-1)
    deviation = variance.sqrt()[:, None]
    analysis = root @ axes / deviation
    inverse = torch.linalg.solve_triangular(root.mT, torch.eye(size, dtype=root.dtype), upper=True)
    return analysis, inverse @ axes * deviation


@contextmanager
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


Levels = tuple[Tensor, Tensor, Tensor]
"""What the codes of the 4, 2 and 1 bit channels stand for: fp16 [rows, width, 2 ** bits] each, ascending."""


def fit_levels(channels: Tensor, weights: Tensor, widths: tuple[int, int, int]) -> Levels:
    """Levels of least mean squared error for channels fp32 [rows, n, >= sum(widths)] with weights fp32 [rows, n], by
    Lloyd's iteration from a normal variable's (S. Lloyd, IEEE Trans. Inf. Theory 28(2), 1982): channels have tails."""
    stride = -(-channels.shape[1] // _LLOYD_TOKENS)
    channels, weights = channels[:, ::stride], weights[:, ::stride]
    tiers = channels[..., : sum(widths)].mT.split(list(widths), dim=1)
    fours, twos, ones = (_lloyd(tier, weights, bits) for tier, bits in zip(tiers, _BITS, strict=True))
    return fours, twos, ones


def encode(keys: Tensor, mean: Tensor, analysis: Tensor, levels: Levels) -> Tensor:
    """Packed codes uint8 [rows, n, bytes] of keys [rows, n, D], the nearest level in each channel; channels without
    bits are left out."""
    channels = (keys.float() - mean.float()[:, None]) @ analysis
    tiers = channels[..., : sum(level.shape[1] for level in levels)].split([level.shape[1] for level in levels], dim=-1)
    codes = [_nearest(tier.mT, level.float()).to(torch.uint8).mT for tier, level in zip(tiers, levels, strict=True)]
    return torch.cat([_pack(c, bits) for c, bits in zip(codes, _BITS, strict=True)], dim=-1)


def decode(codes: Tensor, levels: Levels) -> Tensor:
    """The D' channels that have bits, fp32 [rows, n, D'], of packed codes; the first D' columns of the synthesis matrix
    restore a key from them. One look-up a byte gives all of its channels."""
    widths = [level.shape[1] for level in levels]
    parts = codes.split([-(-width * bits // 8) for width, bits in zip(widths, _BITS, strict=True)], dim=-1)
    return torch.cat(
        [_look_up(*tier) for tier in zip(parts, levels, _BITS, strict=True) if tier[0].shape[-1] > 0], dim=-1
    )


def score_pages(
    query: Tensor,
    codes: Tensor,
    mean: Tensor,
    synthesis: Tensor,
    levels: Levels,
    *,
    page_size: int,
    missing: Tensor | None = None,
    newest: Tensor | None = None,
) -> Tensor:
    """Log masses of all pages, fp32 [rows, H, P]: query [rows, H, D] fp32 (scaled), codes uint8 [rows, P * page_size,
    bytes], mean fp16 [rows, D], synthesis fp16 [rows, D, D'] of the channels that have bits. The first ``missing``
    int64 [rows] tokens of each row do not count, nor do pages behind the ``newest`` int64 [1]."""
    logits = _logits(query, mean, synthesis, decode(codes, levels))
    return mask_behind(page_masses(mask_tokens(logits, missing), page_size), newest)


def attend_index(
    query: Tensor,
    codes: Tensor,
    mean: Tensor,
    synthesis: Tensor,
    levels: Levels,
    *,
    excluded: Tensor,
    page_size: int,
    missing: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the restored keys themselves, of the pages that are not excluded: mean key and log-sum-exp, fp32
    ([rows, H, D], [rows, H]); (0, -inf) where nothing is left. The H = Q * R query heads of a row are R of each of
    its Q queries; ``excluded`` is bool [rows * Q, P]. The rest is as in ``score_pages``."""
    channels = decode(codes, levels)
    logits = mask_tokens(soft_cap(_logits(query, mean, synthesis, channels), softcap), missing)
    weighed, lse = weigh(mask_pages(logits, excluded, page_size), channels)
    keys = weighed @ synthesis.float().mT + mean.float()[:, None]
    return keys.masked_fill(lse.isneginf()[..., None], 0.0), lse


def _logits(query: Tensor, mean: Tensor, synthesis: Tensor, channels: Tensor) -> Tensor:
    return query @ synthesis.float() @ channels.mT + query @ mean.float()[..., None]


def _look_up(packed: Tensor, levels: Tensor, bits: int) -> Tensor:
    """Channels fp32 [rows, n, width] of one tier's packed codes [rows, n, bytes]."""
    rows, _, n_bytes = packed.shape
    tables = _byte_tables(levels.float(), bits, n_bytes)
    offsets = torch.arange(rows * n_bytes, dtype=torch.int32, device=packed.device).view(rows, 1, n_bytes) * 256
    found: Tensor = F.embedding(packed.int() + offsets, tables)
    return found.flatten(2)[..., : levels.shape[1]]


def _byte_tables(levels: Tensor, bits: int, n_bytes: int) -> Tensor:
    """What every value of every byte stands for, fp32 [rows * bytes * 256, 8 / bits]."""
    per_byte = 8 // bits
    padded = F.pad(levels, (0, 0, 0, n_bytes * per_byte - levels.shape[1])).unflatten(1, (n_bytes, per_byte))
    shifts = torch.arange(per_byte, device=levels.device) * bits
    codes = (torch.arange(256, device=levels.device)[:, None] >> shifts) & (2**bits - 1)  # [256, per byte]
    tables: Tensor = padded.transpose(2, 3).gather(2, codes.expand(*padded.shape[:2], -1, -1))
    return tables.reshape(-1, per_byte)


def _nearest(tier: Tensor, levels: Tensor) -> Tensor:
    """The code of every value of tier [rows, width, n], int32."""
    thresholds = (levels[..., 1:] + levels[..., :-1]) / 2
    return torch.searchsorted(thresholds.contiguous(), tier.contiguous(), out_int32=True)


def _lloyd(tier: Tensor, weights: Tensor, bits: int) -> Tensor:
    positive = torch.tensor(_POSITIVE[bits], device=tier.device)
    total = weights.sum(-1)[:, None, None].clamp_min(1)
    weights = weights[:, None].expand_as(tier)
    deviation = ((tier.square() * weights).sum(-1, keepdim=True) / total).sqrt()
    levels = torch.cat([-positive.flip(0), positive]) * deviation
    lanes = torch.arange(tier.shape[-1], device=tier.device) % _LANES
    for _ in range(_LLOYD_STEPS):
        places = _nearest(tier, levels).long() * _LANES + lanes
        empty = levels.new_zeros(*levels.shape[:-1], levels.shape[-1] * _LANES)
        counts, sums = (
            empty.scatter_add(-1, places, what).unflatten(-1, (-1, _LANES)).sum(-1)
            for what in (weights, tier * weights)
        )
        levels = torch.where(counts > 0, sums / counts.clamp_min(1e-6), levels)
    return levels.half()


def _shrunken(moment: Tensor, share: float) -> Tensor:
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (1 - share) * moment + share * size[:, None, None] * _identity(moment)


def _ridged(covariance: Tensor, share: float) -> Tensor:
    size = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return covariance + share * size[:, None, None] * _identity(covariance)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [..., w] into ceil(w * bits / 8) bytes of consecutive channels, lowest bits first."""
    per_byte = 8 // bits
    n_bytes = -(-codes.shape[-1] // per_byte)
    missing = n_bytes * per_byte - codes.shape[-1]
    padded = (F.pad(codes, (0, missing)) if missing else codes).unflatten(-1, (n_bytes, per_byte))
    joined: Tensor = padded[..., 0]
    for place in range(1, per_byte):
        joined = joined | padded[..., place] << place * bits
    return joined
