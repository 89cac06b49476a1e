"""Whole steps of a layer through the Triton kernels (in their interpreter) and through the references."""

import pytest
import torch
from kvoffload_kernels import dispatch
from layers import geometry, new_layer, step, take_in, tokens
from torch.testing import assert_close

from kvoffload.attention.fixed import FixedSteps, decode_fixed
from kvoffload.selection import topk

pytest.importorskip("triton")
N_PROMPT, N_STEPS = 110, 3
SIZES = {"page_size": 8, "sinks": 8, "recent": 16, "budget": "15%"}


def steps_of(settings, padding):
    shape = geometry(key_dim=16, page_size=8)
    query, keys, values = tokens(shape, N_PROMPT + N_STEPS)
    layer = new_layer(shape, **(SIZES | settings))
    take_in(layer, query[:, :, :N_PROMPT], keys[:, :N_PROMPT], values[:, :N_PROMPT], padding)
    return torch.cat(
        [step(layer, query, keys, values, slice(i, i + 1)) for i in range(N_PROMPT, N_PROMPT + N_STEPS)], 2
    )


def fixed_steps_of(settings, padding):
    shape = geometry(key_dim=16, page_size=8)
    query, keys, values = tokens(shape, N_PROMPT + N_STEPS)
    layer = new_layer(shape, **(SIZES | settings))
    take_in(layer, query[:, :, :N_PROMPT], keys[:, :N_PROMPT], values[:, :N_PROMPT], padding)
    maker, steps = FixedSteps([layer], room_tokens=64), []
    for i in range(N_PROMPT, N_PROMPT + N_STEPS):
        assert maker.advance()
        part = decode_fixed(layer, query[:, :, i], keys[:, i : i + 1], values[:, i : i + 1])
        maker.finish()
        steps.append(torch.cat([part.output, part.lse[..., None]], -1))
    return torch.stack(steps, 2), layer.meter.completion_mass


@pytest.mark.parametrize("steps_of", [steps_of, fixed_steps_of], ids=["ordinary", "fixed"])
@pytest.mark.parametrize(
    ("selector", "completion", "gpu_cache", "padding"),
    [
        ("transform", "regression", "off", None),
        ("transform", "sketch", "64KiB", torch.tensor([0, 21])),
        ("quantized:group=16", "regression", "64KiB", torch.tensor([0, 21])),
        ("quantized:group=16", "anchored:segments=5", "off", None),
        ("quantized:group=16", "anchored:segments=5,dtype=bfloat16", "64KiB", torch.tensor([0, 21])),
        ("quantized:group=16", "none", "off", None),
        ("bounds", "none", "64KiB", None),
    ],
)
def test_a_step_through_the_kernels_is_one_through_the_references(
    selector, completion, gpu_cache, padding, steps_of, short_fits, monkeypatch
):
    settings = {"selector": selector, "completion": completion, "gpu_cache": gpu_cache}
    monkeypatch.setattr(topk, "fuses_top_pages", lambda scores, n_slices: True)  # the same Top-K in both
    expected = steps_of(settings, padding)
    monkeypatch.setattr(dispatch, "_verified", lambda folder, tensor: True)
    assert_close(steps_of(settings, padding), expected, atol=1e-3, rtol=1e-3)
