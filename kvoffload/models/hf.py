"""The transformers seam: a registered attention function, a registered mask function, and a cache whose layers only
count.

``update()`` of an offloaded layer returns nothing but the new tokens, tagged with the layer, so dense KV never exists
on the device; the attention function appends and attends. Layers that are bounded by themselves (sliding windows,
linear attention) keep the library's own cache and dense attention.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from kvoffload_kernels.dense_attention import fused
from kvoffload_kernels.dense_attention.reference import soft_cap, weigh
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from kvoffload.errors import UnsupportedModelError
from kvoffload.models.tagged import AttendingLayer
from kvoffload.values import Partial, merge

NAME = "kvoffload"  # transformers treats names with "flash", "sdpa", "flex_attention", "paged|" or "/" specially

_UNSUPPORTED = ("indices", "block_indices", "position_bias", "sinks")


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' contract: query [B, H, Q, D] with rotary applied, key and value [B, G, n, D] not repeated, to
    ([B, Q, H, Dv], None). ``s_aux`` are learned sinks [H] (gpt-oss): mass without a value."""
    unknown = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unknown:
        raise UnsupportedModelError(f"the attention arguments {unknown} of {type(module).__name__} are not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = AttendingLayer.of(key)
    if layer is None:
        return _dense(module, query, key, value, attention_mask, scale, dropout, softcap, s_aux, kwargs), None
    plain = attention_mask is None and softcap is None and s_aux is None
    if plain and layer.is_open() and fused.supports_causal(query, key, value):
        first = fused.attend_causal(query, key, value, scale=scale)
        layer.open_with(query, key, value, scale=scale)
        return first.transpose(1, 2).contiguous(), None
    partial = layer.attend(query, key, value, attention_mask, scale=scale, softcap=softcap)
    if s_aux is not None:
        partial = _with_sinks(partial, s_aux, query.shape[0])
    n_sequences, n_heads, n_queries, _ = query.shape
    output = partial.output.reshape(n_sequences, n_heads, n_queries, -1).to(query.dtype)
    return output.transpose(1, 2).contiguous(), None


def _with_sinks(partial: Partial, s_aux: Tensor, n_sequences: int) -> Partial:
    """Partial [rows, R, Q, Dv] with the heads' sinks [H] in the denominator."""
    rows, group, _ = partial.lse.shape
    mass = s_aux.float().repeat(n_sequences).view(rows, group, 1).expand_as(partial.lse)
    return merge([partial, Partial(torch.zeros_like(partial.output), mass)])


def _dense(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """Layers outside the offloaded cache: whatever the mask says, causal where it says nothing."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    if mask is not None and mask.shape[-2] == 1 < n_queries:  # our own padding mask: causality is ours to add
        ones = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query.device)
        mask = mask & ones.tril(n_keys - n_queries)
    if softcap is None and s_aux is None:
        output, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scale, dropout=dropout, **kwargs)
        return output
    if mask is None:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query.device).tril(n_keys - n_queries)[None, None]
    group = query.shape[1] // key.shape[1]
    logits = query.float() * scale @ key.float().repeat_interleave(group, 1).transpose(-1, -2)
    logits = soft_cap(logits, softcap).masked_fill(~mask, -torch.inf)
    partial = Partial(*weigh(logits, value.repeat_interleave(group, 1)))
    if s_aux is not None:
        sinks = s_aux.float()[None, :, None].expand_as(partial.lse)
        partial = merge([partial, Partial(torch.zeros_like(partial.output), sinks)])
    return partial.output.to(query.dtype).transpose(1, 2).contiguous()


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Plain causal layers get None or their padding as bool [B, 1, 1, KV], never Q x KV; all other patterns get
    sdpa's mask."""
    if local_size is not None or mask_function is not causal_mask_function or not allow_is_causal_skip:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            **kwargs,
        )
    if attention_mask is None:
        return None
    missing = max(0, kv_length - attention_mask.shape[-1])
    return F.pad(attention_mask.bool(), (0, missing), value=True)[:, None, None, :kv_length]


def register() -> None:
    """Make the name known to transformers; may be called more than once."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
