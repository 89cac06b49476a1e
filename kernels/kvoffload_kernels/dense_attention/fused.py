"""The same partial through torch's fused attention, which also returns the log-sum-exp (private ATen operators)."""

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_CUDA_HALF = (torch.bfloat16, torch.float16)
_CUDNN_TOKENS = 16384
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def supported(query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, softcap: float | None) -> bool:
    """Whether ``attend`` below takes these tensors: no mask, no soft cap, one head size, at least one key."""
    plain = valid is None and softcap is None and keys.shape[1] > 0
    return plain and keys.shape[-1] == values.shape[-1] and query.dtype == keys.dtype


def supports_causal(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether ``attend_causal`` runs these without a matrix of all logits."""
    sizes_fit = keys.shape[-1] == values.shape[-1] <= 256 and query.dtype == keys.dtype
    return sizes_fit and (query.device.type == "cpu" or query.dtype in _CUDA_HALF)


def attend_causal(query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
    """Causal attention of tokens that nothing comes before, in the input's dtype: query [B, H, Q, D], keys and values
    [B, G, Q, D] to [B, H, Q, D]; no log-sum-exp, and whichever kernel of torch's is the fastest."""
    group, causal = query.shape[1] // keys.shape[1], query.shape[2] > 1
    if not _prefers_cudnn(query):
        gqa = group > 1
        return F.scaled_dot_product_attention(query, keys, values, is_causal=causal, scale=scale, enable_gqa=gqa)
    if group > 1:  # cuDNN's is not offered heads that are shared
        keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    with sdpa_kernel(_BACKENDS, set_priority=True):
        return F.scaled_dot_product_attention(query, keys, values, is_causal=causal, scale=scale)


def _prefers_cudnn(query: Tensor) -> bool:
    """torch takes its own flash attention first; cuDNN's is faster on Hopper alone (huggingface/transformers#48163),
    once a prompt is so long that its plan, which is made for every new length, does not matter."""
    if not query.is_cuda or query.shape[2] < _CUDNN_TOKENS:
        return False
    return torch.cuda.get_device_capability(query.device)[0] == 9


def attend(query: Tensor, keys: Tensor, values: Tensor, *, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """As ``reference.attend`` without ``valid`` and ``softcap``; the output is rounded to the input's dtype once."""
    rows, group = query.shape[:2]
    k, v = (t[:, None].expand(rows, group, *t.shape[1:]) for t in (keys, values))
    if query.device.type == "cpu":
        cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = cpu(query, k, v, 0.0, causal, scale=scale)
    elif query.dtype in _CUDA_HALF:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        output, lse = flash(query, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        output, lse = efficient(query, k, v, None, True, 0.0, causal, scale=scale)[:2]
    return output.float(), lse[..., : query.shape[2]].float()
