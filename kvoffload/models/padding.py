"""The left padding of a batch, as its attention mask tells it."""

import torch
from torch import Tensor

from kvoffload.attention.layer import LayerCache
from kvoffload.errors import UnsupportedModelError, UsageError


def note_padding(kv: LayerCache, mask: Tensor | None) -> None:
    """Left padding of each row from bool [B, 1, 1, KV]; anything but left padding is refused."""
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape[-2] != 1:
        raise UnsupportedModelError(f"an attention mask of shape {list(mask.shape)} is not supported")
    real = mask[:, 0, 0]
    padding = (~real).sum(-1)
    slots = torch.arange(real.shape[1], device=real.device)
    if not bool((real == (slots >= padding[:, None])).all()):
        raise UsageError("attention_mask must be left padding: zeros, then ones, in every row")
    if kv.anchors.padding is not None or bool(padding.any()):
        kv.anchors.padding = padding.repeat_interleave(kv.geometry.n_kv_heads)
