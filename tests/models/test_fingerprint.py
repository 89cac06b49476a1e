"""Calibration files are bound to a model's weights: its own are accepted, all others refused by name."""

import json

import pytest
import torch
from families import family_model

from kvoffload import cli
from kvoffload.completion.calibrated import Calibration, write_calibration
from kvoffload.completion.feature_maps import MapWeights
from kvoffload.config import RuntimeConfig
from kvoffload.errors import UsageError
from kvoffload.models import catalog
from kvoffload.models.catalog import ModelSource, resolve
from kvoffload.models.fingerprint import weights_hash
from kvoffload.runtime.engine import Runtime


@pytest.fixture
def folder(tmp_path):
    family_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def maps_for(weights, path, n_layers=4, **more):
    """Maps of zeros for the tiny llama."""
    tensors = {}
    for layer in range(n_layers):
        tensors |= MapWeights(
            torch.zeros(2, 1, 4, 16), torch.zeros(2, 1, 4), torch.zeros(2, 2, 4, 16), torch.zeros(2, 2, 4)
        ).tensors(layer)
    options = {"family": "exp", "features": 4, **more}
    figures = {layer: {"output": 0.0} for layer in range(n_layers)}
    write_calibration(
        path,
        Calibration(completion="phi", model="mine", weights=weights, data="d", options=options, layers=figures),
        tensors,
    )
    return f"phi:file={path}"


def test_the_hash_follows_weights_and_config_and_nothing_else(folder):
    before = weights_hash(resolve(str(folder)))
    (folder / "README.md").write_text("a model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9"}))
    assert weights_hash(resolve(str(folder))) == before
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert weights_hash(resolve(str(folder))) != before
    (folder / "config.json").write_text(json.dumps(config))
    assert weights_hash(resolve(str(folder))) == before
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights_hash(resolve(str(folder))) != before


def test_shapes_differ_from_each_other():
    assert weights_hash(resolve("tiny")) != weights_hash(resolve("qwen2.5-0.5b-shape"))


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="no weight files"):
        weights_hash(resolve(str(tmp_path)))


def test_another_models_file_is_refused_before_the_weights_load(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "shape_model", lambda *_, **__: pytest.fail("weights were loaded"))
    completion = maps_for("0" * 32, tmp_path / "phi.safetensors")
    with pytest.raises(UsageError, match=r"was calibrated for 'mine' \(weights 0+\) and cannot be used with 'tiny'"):
        Runtime.from_pretrained("tiny", completion=completion)


def test_its_own_file_is_accepted_by_every_way_in(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    completion = maps_for(weights_hash(resolve(str(folder))), tmp_path / "phi.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    Runtime(None, RuntimeConfig(completion=completion, page_size=4)).attach(model).close()


def test_another_page_size_or_selector_is_a_doubt_and_no_refusal(tmp_path):
    made = RuntimeConfig(page_size=8, selector="quantized:bits=4")
    options = {"page_size": 8, "selector": made.selector.model_dump_json()}
    fields = {"completion": maps_for("0" * 32, tmp_path / "phi.safetensors", **options)}
    assert RuntimeConfig(**fields, page_size=8, selector="quantized:bits=4").doubts == []
    assert [doubt.partition("calibrated ")[2] for doubt in RuntimeConfig(**fields).doubts] == [
        "with page_size 8 and is used with 16",
        'with selector {"kind":"quantized","bits":4,"group":64} and is used with {"kind":"transform","bits":2.25}',
    ]


@pytest.mark.parametrize(
    "words",
    [
        "generate -p x --max-new-tokens 1 --model tiny --device cpu --quiet --completion {phi}",
        "sweep --model tiny --task kl --text {text} --contexts 120 --texts 1 --positions 2 --budgets 10% --methods "
        "transform/{phi};transform/{phi}@pool=none --no-plots --out {out}",
    ],
)
def test_a_doubt_is_one_warning_of_a_command(tmp_path, capsys, words):
    (tmp_path / "text.txt").write_text("some words " * 40)
    phi = maps_for(weights_hash(resolve("tiny")), tmp_path / "phi.safetensors", page_size=64)
    told = words.format(phi=phi, text=tmp_path / "text.txt", out=tmp_path / "out")
    assert cli.run(told.split()) == 0
    assert capsys.readouterr().err.count("was calibrated with page_size 64 and is used with 16") == 1


def test_a_model_that_came_from_no_file_is_refused(tmp_path):
    completion = maps_for("0" * 32, tmp_path / "phi.safetensors")
    with pytest.raises(UsageError, match="weight files are not known"):
        Runtime(None, RuntimeConfig(completion=completion)).attach(family_model("llama"))


def test_a_loaded_model_with_other_weights_is_refused(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    completion = maps_for("0" * 32, tmp_path / "phi.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with pytest.raises(UsageError, match="cannot be used with"):
        Runtime(None, RuntimeConfig(completion=completion)).attach(model)


def test_a_hub_model_is_hashed_by_its_snapshot(folder, monkeypatch):
    """The same files give the same hash, wherever they lie."""
    import huggingface_hub

    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert weights_hash(ModelSource("hub", "a/b", revision="main")) == weights_hash(resolve(str(folder)))
    assert asked == [("a/b", "main")]
