"""The spelling of methods and lists, and what a sweep refuses before anything loads."""

import re
from pathlib import Path

import pytest
import torch

from kvoffload.completion.calibrated import Calibration, write_calibration
from kvoffload.errors import UsageError
from kvoffload.evaluation.methods import Method, cross, split_list
from kvoffload.evaluation.spec import load_spec
from kvoffload.layer_budgets import KIND

COMMON = {"offload": "cpu", "page_size": 16}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some words " * 50)
    return path


@pytest.fixture
def flags(text, tmp_path):
    return {
        "model": "tiny", "task": "kl", "text": [text], "contexts": "64,1k", "budgets": "1%,5%",
        "selectors": "bounds,quantized:bits=4,group=64", "completions": "none,anchored", "out": tmp_path / "out",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("bounds,quantized", ["bounds", "quantized"]),
        ("quantized:bits=4,group=64,bounds", ["quantized:bits=4,group=64", "bounds"]),
        ("a/b:x=1, y=2 ; c/d@pool=none, e/f", ["a/b:x=1, y=2", "c/d@pool=none", "e/f"]),
        ("1%,5%", ["1%", "5%"]),
        (" ,;", []),
    ],
)
def test_a_comma_before_a_name_and_equals_is_one_between_options(text, items):
    assert split_list(text) == items


def test_a_method_becomes_a_configuration():
    config = Method.parse("quantized:bits=4/anchored:segments=8+pages@gate@pool=none").config("2%", COMMON)
    assert (config.selector.kind, config.selector.bits) == ("quantized", 4)
    assert [c.kind for c in config.completion] == ["anchored", "pages"]
    assert (config.gate, config.pool, str(config.budget)) == (True, "none", "2%")


def test_settings_of_all_methods_give_way_to_a_methods_own_and_are_in_its_name():
    method = Method.parse("bounds/none@pool=none").with_settings({"pool": "layer", "index": "cpu"})
    assert method.name == "bounds/none@index=cpu@pool=none"


def test_equal_methods_have_equal_names():
    assert Method.parse("a/b@pool=none@gate").name == Method.parse(" a/b @gate @pool=none").name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("bounds", "selector/completion"),
        ("/none", "selector/completion"),
        ("bounds/none@budget=1%", "budget"),
        ("bounds/none@page_size=32", "page_size"),
        ("bounds/none@speed=2", "accepted names"),
    ],
)
def test_what_no_method_can_be_is_refused(text, told):
    with pytest.raises(UsageError, match=told):
        Method.parse(text)


def test_every_policy_is_crossed_with_every_pair():
    assert cross(["a"], ["x", "y"], [], ["none", "prhs:block=8"]) == [
        "a/x", "a/y", "a/x@policy=prhs:block=8", "a/y@policy=prhs:block=8",
    ]  # fmt: skip
    assert split_list("none,prhs:block=8,tau=0.5;retro+resa") == ["none", "prhs:block=8,tau=0.5", "retro+resa"]


def test_everything_is_crossed():
    assert cross(["a"], ["x", "y"], ["layer", "none"]) == [
        "a/x@pool=layer", "a/x@pool=none", "a/y@pool=layer", "a/y@pool=none",
    ]  # fmt: skip


def test_a_spec_lists_every_method_once(flags):
    spec = load_spec(flags | {"methods": "bounds/none;mean/pages"}, None)
    assert [m.name for m in spec.compared] == [
        "bounds/none", "mean/pages", "bounds/anchored", "quantized:bits=4,group=64/none",
        "quantized:bits=4,group=64/anchored",
    ]  # fmt: skip
    assert spec.contexts == (64, 1024)


def test_baseline_budgets_are_for_selection_only(flags):
    spec = load_spec(flags | {"baseline_budgets": "5%,20%"}, None)
    found = {m.name: spec.budgets_of(m) for m in spec.compared}
    assert found["bounds/none"] == ("1%", "5%", "20%")
    assert found["bounds/anchored"] == ("1%", "5%")


def test_flags_go_before_the_file(flags, tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text('contexts = [32]\nbudgets = ["3%"]\npositions = 7\ntexts = 3\n[set]\nindex = "cpu"\ngate = false\n')
    spec = load_spec({**flags, "texts": 2, "contexts": "16"}, file)
    assert (spec.contexts, spec.task.positions, spec.task.texts) == ((16,), 7, 2)
    assert spec.compared[0].name == "bounds/none@gate=false@index=cpu"


def test_a_task_may_be_a_table_or_a_spelling(flags, tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text('[task]\nkind = "output"\npositions = 9\n')
    without = {name: value for name, value in flags.items() if name != "task"}
    assert load_spec(without, file).task.positions == 9
    assert load_spec(flags | {"task": "kl:positions=11"}, None).task.positions == 11


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"task": {"texts": 2}}, "task: missing; give --task or task = in the file, one of kl, output"),
        ({"task": "speed"}, "task: 'speed' is unknown; accepted: kl, output"),
        ({"task": "kl:depth=3"}, "depth: the task 'kl' has no such field"),
        ({"task": "kl", "text": ["nowhere.txt"]}, "'nowhere.txt' is no file"),
        ({"text": []}, "give a text file"),
        ({"positions": 1}, "positions: 1"),
        ({"contexts": "0"}, "'0' is not a number of tokens"),
        ({"contexts": ""}, "contexts"),
        ({"budgets": "half"}, "'half' is not a budget"),
        ({"selectors": "psychic"}, "'psychic' is unknown; accepted"),
        ({"completions": "anchored:segments=x"}, "segments"),
        ({"completions": ""}, "give both"),
        ({"selectors": "", "completions": ""}, "nothing to compare"),
        ({"selectors": "", "completions": "", "methods": "mean/none", "pools": "none"}, "pools"),
        ({"baseline": "bounds"}, "selector/completion"),
        ({"shard": "5/4"}, "'5/4' is not a part"),
        ({"set": ["dtype=float32"]}, "'dtype=float32'"),
        ({"offload": "tape"}, "'tape' is unknown"),
        ({"page_size": 17}, "17 is not a power of two"),
        ({"metric": "x"}, "metric: unknown name; accepted"),
    ],
)
def test_bad_values_are_named(flags, changed, told):
    with pytest.raises(UsageError, match=re.escape(told)) as refused:
        load_spec(flags | changed, None)
    assert "\n" not in str(refused.value)


def test_what_is_missing_is_named(flags):
    with pytest.raises(UsageError, match="--model, --contexts, --budgets, --out"):
        load_spec({"task": "kl"}, None)


CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("sweep-*.toml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_that_is_kept_is_a_sweep(file, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("none", "regression"):  # what sweep-layer-budgets tells to make first
        header = Calibration(completion=KIND, model="m", weights="w", data="d", options={}, layers={})
        write_calibration(tmp_path / f"layers.{name}.safetensors", header, {"layers.0.divergence": torch.zeros(5)})
    text.write_text('{"task": "mine", "id": "1", "prompt": "p", "answers": ["a"]}\n')
    spec = load_spec({"text": [text], "out": tmp_path}, file)
    assert {m.name for m in spec.compared} >= {spec.baseline}
    assert all(spec.budgets_of(method) for method in spec.compared)
