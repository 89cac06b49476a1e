"""How many tokens of a prompt go through the model at once."""

from typing import Any

import torch

_CPU_TOKENS = 1024
_SAVED_TOKENS = 8192  # between two saves of a prefill that can be broken off
_LEAST_TOKENS = 1024
_STEP_TOKENS = 256
_SHARE = 0.8  # of the free memory; the rest is for what allocators lose


def chunk_tokens(model: Any, *, saved: bool) -> int:
    """As many as fit on the device with everything that a layer's forward holds; fewer where the prefill is ``saved``
    after every chunk. On a CPU, where nothing is gained, few."""
    if model.device.type != "cuda":
        return _CPU_TOKENS
    per_token = activation_bytes(model.config.get_text_config(decoder=True), model.dtype.itemsize)
    return fitting_tokens(free_device_bytes(model.device), per_token, _SAVED_TOKENS if saved else None)


def fitting_tokens(free_bytes: int, bytes_a_token: int, most: int | None = None) -> int:
    """Tokens for which there is room, in whole steps, but never less than what keeps a GPU busy."""
    n_tokens = int(free_bytes * _SHARE) // bytes_a_token // _STEP_TOKENS * _STEP_TOKENS
    return max(n_tokens if most is None else min(n_tokens, most), _LEAST_TOKENS)


def activation_bytes(text_config: Any, itemsize: int) -> int:
    """Device bytes of one token in a forward at their peak: the gated MLP's three products, or the attention's copies
    of queries with the fp32 partials that are merged; norms in fp32; and the KV of two layers on their way out, with
    copies."""
    hidden, n_heads = text_config.hidden_size, text_config.num_attention_heads
    head = getattr(text_config, "head_dim", None) or hidden // n_heads
    n_kv_heads = getattr(text_config, "num_key_value_heads", None) or n_heads
    inner = getattr(text_config, "intermediate_size", 4 * hidden)
    experts = getattr(text_config, "num_experts_per_tok", None) or 0
    inner = max(inner, experts * (getattr(text_config, "moe_intermediate_size", None) or inner))
    widest = max(3 * inner * itemsize, n_heads * head * (4 * itemsize + 16))
    return int(widest + (4 * hidden + 16 * n_kv_heads * head) * itemsize + 12 * hidden)


def free_device_bytes(device: torch.device) -> int:
    """What torch may still take: of the device, of its own cache, and of the process's share."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free, share - reserved) + reserved - allocated
