"""The runtime inside transformers' own ``generate``, for one call."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvoffload.config import RuntimeConfig
from kvoffload.errors import UsageError
from kvoffload.runtime.engine import Runtime, checked


def generate(
    model: Any,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    kvoffload: RuntimeConfig | Mapping[str, Any] | None = None,
    **model_kwargs: Any,
) -> Any:
    """For ``model.generate(**inputs, custom_generate=kvoffload.generate, kvoffload={"budget": "5%"})``: greedy search
    and sampling as the library does them, the KV of this call in the configured tier and gone after it.

    ``kvoffload`` is a RuntimeConfig or its fields. Raises UsageError for beams, for prompt lookup and for a cache that
    holds tokens; the library tells no callable of a streamer or of an assistant model: to stream, pass
    ``past_key_values=Runtime(None, config).attach(model)`` instead.
    """
    if generation_config.num_beams > 1:
        raise UsageError(f"num_beams: {generation_config.num_beams} is not supported: one sequence a row is followed")
    if generation_config.prompt_lookup_num_tokens:
        raise UsageError("prompt_lookup_num_tokens: prompt lookup is not supported")
    given = model_kwargs.get("past_key_values")
    if given is not None and given.get_seq_length() > 0:
        raise UsageError("past_key_values: custom_generate makes a cache of its own; pass one or the other")
    config = kvoffload if isinstance(kvoffload, RuntimeConfig) else checked(dict(kvoffload or {}))
    with Runtime(None, config).attach(model, expected_tokens=generation_config.max_length or 0) as cache:
        options = model_kwargs | {"past_key_values": cache, "use_cache": True}
        found = type(model)._sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **options)
    if not isinstance(found, Tensor):
        found.past_key_values = None
    return found
