"""The same partial through torch's fused attention, which also returns the log-sum-exp (private ATen operators)."""

import torch
from torch import Tensor

_CUDA_HALF = (torch.bfloat16, torch.float16)


def supported(query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, softcap: float | None) -> bool:
    """Whether ``attend`` below takes these tensors: no mask, no soft cap, one head size, at least one key."""
    plain = valid is None and softcap is None and keys.shape[1] > 0
    return plain and keys.shape[-1] == values.shape[-1] and query.dtype == keys.dtype


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
