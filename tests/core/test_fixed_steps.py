"""Steps of fixed shapes against ordinary ones: the same results, the same counts, and tensors that stay in place."""

import pytest
import torch
from layers import PAIRS, geometry, new_layer, take_in, tokens
from torch.testing import assert_close

from kvoffload.attention.decode import decode
from kvoffload.attention.fixed import FixedSteps, decode_fixed
from kvoffload.completion.sketch import FIT_TOKENS as SKETCH_FIT_TOKENS
from kvoffload.config import RuntimeConfig
from kvoffload.index.transform import FIT_TOKENS

PAGE, ROOM = 4, 32  # tokens of a page, and of the room that layers get at a time


def filled(n_prompt, n_steps, padding=None, **fields):
    layer = new_layer(geometry(), **fields)
    given = tokens(layer.geometry, n_prompt + n_steps)
    query, keys, values = given
    take_in(layer, query[:, :, :n_prompt], keys[:, :n_prompt], values[:, :n_prompt], padding)
    return layer, given


def ordinary(layer, given, steps):
    query, keys, values = given
    return [decode(layer, query[:, :, i], keys[:, i : i + 1], values[:, i : i + 1]) for i in steps]


def fixed(layer, given, steps, maker=None):
    """The same steps in fixed shapes, and the versions that they had."""
    query, keys, values = given
    maker, parts, versions = maker or FixedSteps([layer], room_tokens=ROOM), [], []
    for i in steps:
        assert maker.advance()
        parts.append(decode_fixed(layer, query[:, :, i], keys[:, i : i + 1], values[:, i : i + 1]))
        maker.finish()
        versions.append(maker.version)
    return parts, versions


def assert_same_steps(given, expected):
    for a, b in zip(given, expected, strict=True):
        assert_close(a.output, b.output, atol=1e-5, rtol=1e-5)
        assert_close(a.lse, b.lse, atol=1e-5, rtol=1e-5)


def counts(layer):
    meter, fetch = layer.meter, layer.fetch
    return {
        "steps": meter.steps,
        "context": meter.context_tokens,
        "state": meter.state_bytes_touched,
        "scored": meter.scored_rows,
        "written": meter.written,
        "asked": fetch.n_asked,
        "hits": int(fetch.n_hits),
        "read": fetch.decode.total(),
        "refresh": fetch.refresh.total(),
        "mass": pytest.approx(float(meter.completion_mass), abs=1e-4),
    }


KINDS = [
    ("bounds", "none"),
    ("bounds", "anchored:segments=5"),
    ("mean", "mean_value"),
    ("quantized:group=16", "regression"),
    ("quantized:group=16", "anchored"),
    ("transform", "regression"),
    ("transform", "none"),
    ("transform", "sketch:bits=0.5"),
    ("quantized:group=16", "sketch"),
    ("uniform", "none"),
    ("uniform", "mean_value"),
]


@pytest.mark.parametrize(
    ("budget", "gpu_cache", "padding"),
    [  # every two of them meet
        ("20%", "off", None),
        ("20%", "16KiB", torch.tensor([0, 37])),
        ("48", "off", torch.tensor([0, 37])),
        ("48", "16KiB", None),
        ("100%", "off", None),
        ("100%", "16KiB", torch.tensor([0, 37])),
    ],
)
@pytest.mark.parametrize(("selector", "completion"), KINDS)
def test_steps_of_fixed_shapes_are_ordinary_steps(selector, completion, budget, gpu_cache, padding, short_fits):
    """Across seals and an end of the room."""
    n_prompt = 150
    settings = {
        "selector": selector,
        "completion": completion,
        "budget": budget,
        "gpu_cache": gpu_cache,
        "reanchor": 16,
        "pool": "none" if selector == "uniform" else "layer",  # else heads tie, and which comes first is chance
    }
    plain, given = filled(n_prompt, 50, padding, **settings)
    layer, _ = filled(n_prompt, 50, padding, **settings)
    assert FixedSteps.possible([layer])
    steps = range(n_prompt, n_prompt + 50)
    parts, versions = fixed(layer, given, steps)
    assert_same_steps(parts, ordinary(plain, given, steps))
    assert counts(layer) == counts(plain)
    assert versions[-1] > versions[0]


def test_both_kinds_of_steps_may_follow_each_other():
    settings = {"selector": "quantized:group=16", "completion": "regression", "gpu_cache": "16KiB"}
    plain, given = filled(150, 60, **settings)
    layer, _ = filled(150, 60, **settings)
    maker, parts = FixedSteps([layer], room_tokens=ROOM), []
    for start in range(150, 210, 20):
        parts += fixed(layer, given, range(start, start + 13), maker)[0]
        layer.fix(None)
        parts += ordinary(layer, given, range(start + 13, start + 20))
    assert_same_steps(parts, ordinary(plain, given, range(150, 210)))
    assert counts(layer) == counts(plain)


def test_cropped_tokens_are_not_seen_any_more():
    plain, given = filled(150, 20, selector="bounds")
    layer, _ = filled(150, 20, selector="bounds")
    maker = FixedSteps([layer], room_tokens=ROOM)
    for steps in (range(150, 153), range(151, 164)):
        expected = ordinary(plain, given, steps)
        assert_same_steps(fixed(layer, given, steps, maker)[0], expected)
        for each in (plain, layer):
            each.anchors.crop(2)


@pytest.mark.parametrize(
    "fields",
    [
        {"selector": "exact", "completion": "none"},
        {"selector": "bounds", "completion": "pages"},
        {"completion": "none+anchored", "gate": True},
        {"policy": "refresh"},
        {"policy": "retro"},
        {"max_dropped_mass": 0.1},
        {"audit": 3},
        {"offload": "nvme", "cpu_max": "1MiB", "fetch": "deadline"},
    ],
    ids=str,
)
def test_what_depends_on_the_host_has_ordinary_steps(fields):
    layer, _ = filled(FIT_TOKENS + 60, 0, tier=fields.get("offload", "cpu"), **fields)
    assert not FixedSteps.possible([layer])
    assert not RuntimeConfig(**fields).replays_steps


@pytest.mark.parametrize(("selector", "completion"), PAIRS)
def test_a_configuration_says_whether_steps_can_have_fixed_shapes(selector, completion):
    fields = {"selector": selector, "completion": completion}
    layer, _ = filled(SKETCH_FIT_TOKENS + 60, 0, **fields)
    assert FixedSteps.possible([layer]) == RuntimeConfig(**fields).replays_steps


def test_before_values_are_fitted_steps_are_ordinary():
    layer, _ = filled(FIT_TOKENS + 60, 0, selector="transform", completion="sketch")
    assert not FixedSteps.possible([layer])


def test_before_the_first_page_steps_are_ordinary():
    layer, _ = filled(10, 0, selector="bounds")
    assert not FixedSteps.possible([layer])


def test_before_a_row_has_its_sinks_steps_are_ordinary():
    layer, _ = filled(40, 0, torch.tensor([0, 38]), selector="bounds")
    assert not FixedSteps.possible([layer])
