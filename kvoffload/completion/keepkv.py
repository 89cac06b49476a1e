"""``keepkv``: KeepKV (arXiv:2504.09936, section on zero-inference-perturbation merging; full text and official code
read): merging instead of eviction, with electoral votes.

An entry has p votes and counts as p e^(q . k). Tokens with weights w_i = p_i s_i, s_i = e^(q0 . k_i) for the merge
query q0, become one entry with p = sum p_i, v = sum w_i v_i / sum w_i and the key
(sum w_i k_i) ln(sum w_i / sum p_i) / sum w_i ln s_i: exact for q0. That factor explodes where sum w_i ln s_i is near 0;
outside of 1/2 to 2 the convex key sum w_i k_i / sum w_i stands instead (the official code always takes it); the
statistics of a session tell how many entries have one.

As an estimator of pages: each page keeps the ``entries`` tokens with the largest weights, every other token joins the
kept key of highest cosine if that is above ``threshold`` and is dropped otherwise. The merge query is the mean query of
the prefill instead of a moving average of scores, so that pages are merged once, when they seal.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kvoffload.completion.base import Completion, CompletionConfigBase
from kvoffload.completion.page_entries import Entries, PageEntriesCompletion, entry_bytes
from kvoffload.geometry import Geometry
from kvoffload.values import Pages

_FACTORS = 0.5, 2.0


class KeepkvCompletionConfig(CompletionConfigBase):
    """``entries`` of each page, fp32; tokens below ``threshold`` are dropped."""

    kind: Literal["keepkv"] = "keepkv"
    entries: int = Field(2, ge=1)
    threshold: float = Field(0.8, ge=-1, le=1)

    def build(self, geometry: Geometry, layer: int, device: torch.device) -> Completion:
        return KeepkvCompletion(min(self.entries, geometry.page_size), self.threshold, geometry.value_dim)

    def index_bytes(self, n_tokens: int, key_dim: int, value_dim: int, page_size: int, itemsize: int) -> int:
        return entry_bytes(n_tokens, page_size, min(self.entries, page_size), key_dim, value_dim)


class KeepkvCompletion(PageEntriesCompletion):
    uses_anchor = True

    def __init__(self, n_entries: int, threshold: float, value_dim: int) -> None:
        self._n_entries, self._threshold = n_entries, threshold
        super().__init__(value_dim)

    def reset(self, anchor: Tensor, *, n_pages: int = 0) -> None:
        super().reset(anchor, n_pages=n_pages)
        self._n_clamped = 0

    def make(self, pages: Pages) -> Entries:
        keys, values = pages.keys.float(), pages.values.float()
        logits = torch.einsum("gd,gpsd->gps", self._anchor, keys)
        weights = logits + pages.log_valid()
        kept = weights.topk(self._n_entries, dim=-1).indices
        groups = assign(keys, kept, self._threshold) & ~weights.isneginf()[:, :, None]
        merged, n_clamped = zip_merge(keys, values, logits, groups)
        self._n_clamped += n_clamped
        return merged

    @property
    def n_clamped(self) -> int:
        return self._n_clamped


def assign(keys: Tensor, kept: Tensor, threshold: float) -> Tensor:
    """Which tokens [..., S, D] go into the entry of each of the kept ones [..., M]: bool [..., M, S], at most one entry
    a token."""
    unit = torch.nn.functional.normalize(keys, dim=-1)
    kept_keys = unit.gather(-2, kept[..., None].expand(*kept.shape, keys.shape[-1]))
    likeness, entry = (kept_keys @ unit.mT).max(-2)  # [..., S]
    number = torch.arange(kept.shape[-1], device=keys.device)[:, None]
    own = kept[..., None] == torch.arange(keys.shape[-2], device=keys.device)  # [..., M, S]
    joins = (entry[..., None, :] == number) & (likeness > threshold)[..., None, :] & ~own.any(-2, keepdim=True)
    return own | joins


def zip_merge(keys: Tensor, values: Tensor, logits: Tensor, groups: Tensor) -> tuple[Entries, int]:
    """One entry of each group, bool [..., M, S], of tokens with one vote and logits [..., S] under the merge query; and
    how many keys are the convex ones. A group without tokens has log weight -inf."""
    weights = logits[..., None, :].masked_fill(~groups, -torch.inf)
    log_mass, votes = weights.logsumexp(-1), groups.sum(-1).float()
    shares = (weights - log_mass.masked_fill(log_mass.isneginf(), 0.0)[..., None]).exp()
    mean_logit = (shares * logits[..., None, :]).sum(-1)
    factor = (log_mass - votes.log()) / mean_logit
    exact = (factor >= _FACTORS[0]) & (factor <= _FACTORS[1])
    convex = shares @ keys
    scaled = convex * torch.where(exact, factor, 1.0)[..., None]
    n_clamped = int((~exact & (votes > 1)).sum())
    return Entries(scaled, shares @ values, votes.log()), n_clamped
