"""Configuration: defaults, variants by name, ranges, precedence, and one line for everything refused."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kvoffload.config import VARIANTS, RuntimeConfig, SamplingConfig, explain, parse_variant
from kvoffload.errors import UsageError
from kvoffload.settings import load_settings, to_toml


def refusal(**flags: Any) -> str:
    with pytest.raises(UsageError) as refused:
        load_settings(flags)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_the_defaults_are_those_of_the_command_line() -> None:
    config = RuntimeConfig()
    assert (config.offload, config.selector.kind, [c.kind for c in config.completion]) == (
        "cpu", "transform", ["regression"],
    )  # fmt: skip
    assert (config.sinks, config.recent, config.page_size, config.gpu_cache) == (16, 64, 16, None)
    assert SamplingConfig().max_new_tokens == 256


def test_the_default_completion_reads_the_index_where_there_is_one() -> None:
    for selector, cls in VARIANTS["selector"].items():
        expected = "regression" if cls.has_index else "anchored"  # type: ignore[attr-defined]
        assert [c.kind for c in RuntimeConfig(selector=selector).completion] == [expected]


@pytest.mark.parametrize(("offload", "budget"), [("cpu", "5%"), ("nvme", "5%"), ("none", "100%")])
def test_the_default_budget_is_everything_only_when_nothing_is_offloaded(offload: str, budget: str) -> None:
    assert str(load_settings({"offload": offload}).effective_budget) == budget
    assert str(load_settings({"offload": offload, "budget": "7"}).effective_budget) == "7"


def test_options_of_a_variant_follow_its_name() -> None:
    assert parse_variant(" quantized : bits=4, group=64") == {"kind": "quantized", "bits": 4, "group": 64}
    assert parse_variant("x:a=.5,b=-1,c=no") == {"kind": "x", "a": 0.5, "b": -1, "c": "no"}
    assert load_settings({"selector": "quantized:bits=4"}).selector.bits == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("slot", ["selector", "completion"])
def test_every_variant_can_be_named_and_an_unknown_name_lists_them_all(slot: str) -> None:
    for kind in VARIANTS[slot]:
        assert kind in str(getattr(load_settings({slot: kind}), slot))
    message = refusal(**{slot: "fancy"})
    assert "'fancy'" in message
    assert all(kind in message for kind in VARIANTS[slot])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"selector": "quantized:bits=3"}, "selector.quantized.bits: 3 is unknown; accepted: 1, 2, 4"),
        ({"selector": "quantized:bitz=3"}, "selector.quantized.bitz: unknown name; accepted: bits, group"),
        ({"selector": "mean:x=1"}, "selector.mean.x: unknown name; accepted: no options"),
        ({"selector": "quantized:bits"}, "write name=value"),
        ({"selector": {"bits": 2}}, "names no kind; accepted: quantized"),
        ({"completion": "anchored+phi"}, "'anchored+phi' is more than one; give one, or let --gate choose"),
        ({"gate_recheck": "64"}, "gate_recheck: 64 has nothing to check: give --gate too"),
        ({"gate": True, "gate_recheck": "8"}, "gate_recheck: '8': input should be greater than or equal to 16"),
        ({"reanchor": "2"}, "reanchor: '2': input should be greater than or equal to 16"),
        ({"gate_margin": "1"}, "gate_margin: '1': input should be less than 1"),
        ({"gate_queries": "300"}, "gate_queries: '300': input should be less than or equal to 256"),
        ({"completion": ()}, "completion: (): "),
        ({"offload": "disk"}, "offload: 'disk' is unknown; accepted: none, cpu, nvme"),
        ({"budget": "5Q"}, "budget: '5Q' is not a budget"),
        ({"budget": "101%"}, "more than 100%"),
        ({"nvme_max": "lots"}, "nvme_max: 'lots' is not a size"),
        ({"cpu_max": "-1G"}, "cpu_max: '-1G' is not a size"),
        ({"gpu_cache": "on"}, "gpu_cache: 'on' is not a size"),
        ({"page_size": 24}, "page_size: 24 is not a power of two from 1 to 256"),
        ({"page_size": 0}, "page_size: 0 is not a power of two"),
        ({"sinks": -1}, "sinks: -1"),
        ({"recent": 0}, "recent: 0"),
        ({"prefill_chunk": "0"}, "prefill_chunk: '0'"),
        ({"device": "tpu"}, "device: 'tpu'"),
        ({"num_beams": 4}, "num_beams: 4 is not supported"),
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": "nan"}, "temperature: 'nan'"),
        ({"top_p": 0}, "top_p: 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"stop": [""]}, "stop: ''"),
        ({"colour": "red"}, "colour: unknown name; accepted: "),
    ],
)
def test_what_is_refused_is_named_with_what_was_expected(flags: dict[str, Any], expected: str) -> None:
    assert expected in refusal(**flags)


def test_several_refusals_stay_one_line() -> None:
    message = refusal(sinks=-1, offload="disk")
    assert "sinks: -1" in message
    assert "offload: 'disk'" in message


def test_a_gate_chooses_among_several_completions_whose_options_keep_the_comma() -> None:
    settings = load_settings({"gate": True, "completion": "anchored:segments=8+phi:features=32,seed=1"})
    assert [completion.kind for completion in settings.completion] == ["anchored", "phi"]
    assert settings.completion[1].features == 32  # type: ignore[union-attr]


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.toml"
    file.write_text('sinks = 1\nrecent = 2\npage_size = 4\nselector = { kind = "quantized", bits = 1 }\n')
    monkeypatch.setenv("KVOFFLOAD_RECENT", "20")
    monkeypatch.setenv("KVOFFLOAD_PAGE_SIZE", "8")
    monkeypatch.setenv("KVOFFLOAD_COMPLETION", "phi:features=8")
    monkeypatch.setenv("KVOFFLOAD_STOP", "END")
    monkeypatch.setenv("KVOFFLOAD_CACHE", "/somewhere")
    settings = load_settings({"page_size": 32, "sinks": None, "selector": "mean"}, file)
    assert (settings.sinks, settings.recent, settings.page_size) == (1, 20, 32)
    assert (settings.selector.kind, settings.completion[0].kind, settings.stop) == ("mean", "phi", ("END",))


def test_an_unknown_key_of_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("page_sise = 4\n")
    with pytest.raises(UsageError, match=r"page_sise: unknown name; accepted: .*page_size"):
        load_settings({}, file)


@pytest.mark.parametrize("content", [b"sinks = ", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="is not TOML"):
        load_settings({}, file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load_settings({}, tmp_path / "none.toml")


def test_printed_settings_read_back_as_the_same_settings(tmp_path: Path) -> None:
    flags = {
        "model": "tiny", "prompt": 'say "ä"\n\x7f', "completion": "phi:features=8+none", "gate": True,
        "gpu_cache": "1G", "stop": ["a", "b"], "nvme_dir": "/tmp/x", "budget": "16MiB", "temperature": 0.5,
    }  # fmt: skip
    settings = load_settings(flags)
    file = tmp_path / "printed.toml"
    file.write_text(to_toml(settings.merged()), encoding="utf-8")
    assert tomllib.loads(file.read_text(encoding="utf-8"))["gpu_cache"] == 1 << 30
    assert load_settings({}, file).merged() == settings.merged()
    assert load_settings({}, file).runtime() == settings.runtime()


def test_settings_split_into_what_a_runtime_and_a_generation_take() -> None:
    settings = load_settings({"sinks": 3, "seed": 4, "stop": "x"})
    assert settings.runtime() == RuntimeConfig(sinks=3)
    assert settings.sampling() == SamplingConfig(seed=4, stop=("x",))


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        RuntimeConfig().sinks = 3  # type: ignore[misc]


def test_the_api_explains_its_refusals_too() -> None:
    with pytest.raises(ValidationError) as refused:
        RuntimeConfig(sinkz=3)  # type: ignore[call-arg]
    assert explain(refused.value, RuntimeConfig.model_fields).startswith("sinkz: unknown name; accepted: offload")
