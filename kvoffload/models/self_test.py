"""The start-up parity test: random tokens through the loaded model's own attention and through ours at full budget."""

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kvoffload.config import RuntimeConfig
from kvoffload.errors import UnsupportedModelError
from kvoffload.models.ahead import watch_layers
from kvoffload.models.batch import Fed, can_batch, feed_together
from kvoffload.models.cache import OffloadCache
from kvoffload.models.feed import feed
from kvoffload.models.hf import NAME, register
from kvoffload.models.parallel import stage_layers
from kvoffload.units import Budget

_N_TOKENS, _N_STEPS = 64, 4
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def switch_attention(model: Any) -> str:
    """Send the model's attention through ours; returns what it used before. Raises UnsupportedModelError by name."""
    register()
    before: str = model.config._attn_implementation
    try:
        model.set_attn_implementation(NAME)
    except ValueError as error:
        raise _refused(model, str(error)) from error
    if model.config._attn_implementation != NAME:
        raise _refused(model, "it does not use transformers' attention interface")
    watch_layers(model)
    return before


@torch.inference_mode()
def check_parity(model: Any, config: RuntimeConfig) -> float:
    """Largest logit difference relative to the largest logit; the model is left with our attention."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (1, _N_TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    before = switch_attention(model)
    expected = _own_logits(model, ids, own_attention(model, before))
    given = _through_cache(model, ids, config)
    error, tolerance = _difference(given, expected), _TOLERANCE[model.dtype]
    if error > tolerance and model.dtype != torch.float32:  # many layers: the library's own attentions may differ more
        tolerance = max(tolerance, 2 * _difference(_own_logits(model, ids, "eager"), expected))
    if not error <= tolerance:
        raise _refused(
            model, f"its logits differ by {error:.1e} of the largest logit at full budget (allowed: {tolerance:.0e})"
        )
    return error


def _own_logits(model: Any, ids: Tensor, attention: str) -> Tensor:
    """Logits of the newest tokens by the library's attention of that name; the model is left with ours."""
    model.set_attn_implementation(attention)
    logits: Tensor = model(ids, use_cache=False).logits[0, -_N_STEPS - 1 :].float()
    switch_attention(model)
    return logits


def _difference(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).abs().max() / expected.abs().max())


def _through_cache(model: Any, ids: Tensor, config: RuntimeConfig) -> Tensor:
    with OffloadCache(model.config, _small(config), owned=stage_layers(model)) as cache:
        prompt = ids[:, : _N_TOKENS - _N_STEPS]
        try:
            logits = [model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0]]
            for token in ids[:, _N_TOKENS - _N_STEPS :].split(1, dim=1):
                logits.append(model(token, past_key_values=cache, use_cache=True).logits[0])
        except (RuntimeError, TypeError, AttributeError) as error:
            raise _refused(model, f"it fails under our cache: {error}") from error
        if len(cache.offloaded) != cache.n_offloaded:
            raise _refused(model, "it never calls transformers' attention interface")
    return torch.cat(logits).float()


@torch.inference_mode()
def check_batches(model: Any, config: RuntimeConfig) -> float:
    """Largest difference that sharing a forward makes to the logits of two sequences of different lengths, relative to
    the largest logit; infinite where the model cannot do it."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (2, _N_TOKENS), generator=torch.Generator().manual_seed(1)).to(model.device)
    lengths = (_N_TOKENS, _N_TOKENS // 2)
    with ExitStack() as stack:
        alone, together = (
            [stack.enter_context(OffloadCache(model.config, _small(config))) for _ in lengths] for _ in "ab"
        )
        for cache, row, n in zip([*alone, *together], [*ids, *ids], lengths * 2, strict=True):
            model(row[None, :n], past_key_values=cache, use_cache=True, logits_to_keep=1)
        try:
            given = feed_together(model, together, [3, 5])
        except (RuntimeError, TypeError, AttributeError):
            return math.inf
        if failed := [outcome for outcome in given if isinstance(outcome, BaseException)]:
            raise failed[0]
        expected = [feed(model, cache, ids.new_tensor([[t]]))[:, -1] for cache, t in zip(alone, (3, 5), strict=True)]
    pairs = [(a.logits.float(), b.float()) for a, b in zip(given, expected, strict=True) if isinstance(a, Fed)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def shares_forwards(model: Any, config: RuntimeConfig) -> bool:
    """Whether several sequences of this model can be decoded in one forward, tried on the model itself if the
    configuration tests it."""
    if not can_batch(model, config):
        return False
    return not config.self_test or check_batches(model, config) <= _TOLERANCE[model.dtype]


def _small(config: RuntimeConfig) -> RuntimeConfig:
    """So small that sinks, window, sealed pages, selector and completion all take part in a short text."""
    small = {"sinks": 4, "recent": 8, "page_size": 4, "budget": Budget.parse("100%"), "gate": False}
    first = {"completion": config.completion[:1], "nvme_max": None, "cpu_max": None, "gpu_cache": None, "policy": ()}
    return config.model_copy(update=small | first)


def own_attention(model: Any, before: str) -> str:
    """The attention to compare with: the library's fused one; eager where that would leave out soft-capping or sinks,
    or where the model came with it."""
    config = model.config.get_text_config(decoder=True)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "eager" if capped or not model._supports_sdpa or before == "eager" else "sdpa"


def _refused(model: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} ({model.config.model_type}) cannot be run: {why}")
