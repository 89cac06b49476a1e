"""Built-in shapes: the sizes of well-known models with seeded random weights, for benchmarks and tests.

They have no end-of-sequence token, so that a run always has the length asked for, and a byte-level tokenizer without
special tokens except padding.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_NO_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 256}
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b-shape": ("llama", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": False, "dtype": "bfloat16",
    }),
    "qwen2.5-0.5b-shape": ("qwen2", {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True, "dtype": "bfloat16",
    }),
    "tiny": ("llama", {
        "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 8192,
        "initializer_range": 0.15, "tie_word_embeddings": False, "dtype": "float32",
    }),
}  # fmt: skip


def shape_config(name: str) -> "PreTrainedConfig":
    """The config of a built-in shape."""
    from transformers import AutoConfig

    model_type, values = SHAPES[name]
    return AutoConfig.for_model(model_type, **values, **_NO_SPECIAL)


def shape_model(config: "PreTrainedConfig", *, dtype: "torch.dtype", device: "torch.device") -> "PreTrainedModel":
    """A model with random weights, the same ones on every call; the caller's random state is left alone."""
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model: PreTrainedModel = auto.from_config(config, dtype=dtype).eval()
    return model


def byte_tokenizer() -> "PreTrainedTokenizerBase":
    """One token a byte (ids 0 to 255) and a padding token (256), made without any file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    wrapper: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerBase = wrapper(tokenizer_object=tokenizer, pad_token="<pad>")
    return wrapped
