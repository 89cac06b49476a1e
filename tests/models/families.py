"""Tiny random models of every supported family, and generation through transformers' own cache and ours."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kvoffload.config import RuntimeConfig
from kvoffload.models.cache import OffloadCache
from kvoffload.models.self_test import switch_attention

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "granite": {},
    "olmo2": {},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 16},
    "gemma3_text": {"num_hidden_layers": 6, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "gpt_oss": {"sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
}
EAGER = {"gemma2", "gpt_oss"}  # sdpa leaves out soft-capping and sinks

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def family_model(name: str) -> Any:
    """A model of this family whose attention is far from flat, in fp32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(_SIZES | FAMILIES[name]))).eval().float()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@dataclass(frozen=True)
class Generated:
    tokens: Tensor
    logits: Tensor


def prompt(n_sequences: int, n_tokens: int, n_padding: int) -> dict[str, Tensor]:
    """Random tokens; the first sequence is left-padded."""
    ids = torch.randint(2, 90, (n_sequences, n_tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :n_padding] = 0
    ids[0, :n_padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def generate(model: Any, inputs: dict[str, Tensor], n_new: int, **options: Any) -> Generated:
    output = model.generate(
        **inputs,
        max_new_tokens=n_new,
        min_new_tokens=n_new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return Generated(output.sequences, torch.stack(output.logits))


def dense(model: Any, inputs: dict[str, Tensor], n_new: int) -> Generated:
    """What the library itself gives."""
    model.set_attn_implementation("eager" if model.config.model_type in EAGER else "sdpa")
    return generate(model, inputs, n_new)


def offloaded(
    model: Any, inputs: dict[str, Tensor], n_new: int, config: RuntimeConfig, chunk: int | None = None
) -> tuple[Generated, OffloadCache]:
    """What our cache gives under stock ``generate``; the cache is closed."""
    switch_attention(model)
    with OffloadCache(model.config, config) as cache:
        return generate(model, inputs, n_new, past_key_values=cache, prefill_chunk_size=chunk), cache


def relative_error(a: Generated, b: Generated) -> float:
    return ((a.logits - b.logits).abs().max() / b.logits.abs().max()).item()
