"""``calibrate``: what it learns of the tiny model, how it resumes, and what it refuses."""

import json
import random
import re

import pytest
import torch
from divergence import DivergenceTask
from safetensors.torch import load_file

from kvoffload import cli
from kvoffload.calibration import command, run
from kvoffload.calibration.run import State
from kvoffload.completion.calibrated import read_calibration
from kvoffload.config import RuntimeConfig
from kvoffload.models.catalog import load_model, resolve
from kvoffload.runtime.engine import Runtime

N_LAYERS = 4
SMALL = ["--context", "192", "--sequences", "4", "--queries", "16", "--budgets", "2%,10%", "--features", "16"]
ANCHORS = ["--sinks", "4", "--recent", "8", "--page-size", "4"]
WORDS = "the of to and in is it that was for on are with as his they be at one have this from or had by hot but some"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A few thousand words in a fixed random order."""
    words = random.Random(0).choices(WORDS.split(), k=1500)
    file = tmp_path_factory.mktemp("data") / "words.txt"
    file.write_text(" ".join(words))
    return file


def calibrate(text, out, *more, completion="phi"):
    base = [
        "calibrate",
        "--completion",
        completion,
        "--model",
        "tiny",
        "--data",
        str(text),
        "--out",
        str(out),
        "--quiet",
    ]
    return cli.run([*base, *SMALL, *ANCHORS, "--steps", "25", "--device", "cpu", *more])


@pytest.fixture(scope="module")
def learned(text, tmp_path_factory):
    """One calibrated file of each family, the hedgehog's with a key map for each query head."""
    folder = tmp_path_factory.mktemp("maps")
    for family, key_maps in (("exp", "shared"), ("hedgehog", "each")):
        assert calibrate(text, folder / family, "--family", family, "--key-maps", key_maps) == 0
    return folder


@pytest.mark.parametrize("family", ["exp", "hedgehog"])
def test_training_lowers_the_held_out_loss_and_beats_random_features(learned, family):
    layers = read_calibration(learned / family, "phi").header.layers
    assert sorted(layers) == list(range(N_LAYERS))
    for figures in layers.values():
        assert figures["loss"] < 0.7 * figures["random_loss"]
        assert figures["output"] < min(figures["start_output"], figures["random_output"])
    mean = {name: sum(figures[name] for figures in layers.values()) for name in ("loss", "start_loss")}
    assert mean["loss"] < 0.9 * mean["start_loss"]


@pytest.mark.parametrize("family", ["exp", "hedgehog"])
def test_a_full_budget_equals_dense_with_a_learned_map(learned, family):
    fields = {"sinks": 4, "recent": 8, "page_size": 4, "device": "cpu", "completion": f"phi:file={learned / family}"}
    runtime = Runtime.from_pretrained("tiny", budget="100%", **fields)  # its self-test compares with dense attention
    ids = torch.randint(256, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    task = DivergenceTask(runtime.loaded, ids, n_steps=4, anchors=runtime.config)
    assert abs(task.measure(runtime.config).kl) < 1e-5
    task.close()


def test_a_learned_map_beats_random_features_on_the_models_logits(learned, text):
    loaded = load_model(resolve("tiny"), dtype="float32", device="cpu")
    fields = {"sinks": 4, "recent": 8, "page_size": 4, "self_test": False, "budget": "2%"}
    Runtime(loaded, RuntimeConfig(**fields))
    ids = loaded.tokenizer(text.read_text()[-400:]).input_ids
    task = DivergenceTask(loaded, ids, n_steps=24, anchors=RuntimeConfig(**fields))
    completions = ("phi:features=16", f"phi:file={learned / 'exp'}")
    random_kl, learned_kl = (task.measure(RuntimeConfig(**fields, completion=name)).kl for name in completions)
    task.close()
    assert learned_kl < 0.8 * random_kl


def test_a_killed_run_goes_on_to_the_same_file(text, tmp_path, learned, monkeypatch):
    add, added = State.add, []

    def killed(state, layer, result):
        add(state, layer, result)
        added.append(layer)
        if len(added) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(State, "add", killed)
    assert calibrate(text, tmp_path / "exp") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["exp.partial"]
    assert calibrate(text, tmp_path / "exp", "--host-max", "1") == 0  # one layer a pass: the same captures
    assert added == list(range(N_LAYERS))
    assert [path.name for path in tmp_path.iterdir()] == ["exp"]
    assert (tmp_path / "exp").read_bytes() == (learned / "exp").read_bytes()


def test_what_was_begun_with_other_options_is_not_gone_on_with(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(State, "finish", lambda state: None)
    assert calibrate(text, tmp_path / "o", completion="anchored") == 0
    monkeypatch.setattr(run, "capture", lambda *_, **__: pytest.fail("the model ran"))
    assert calibrate(text, tmp_path / "o", "--seed", "1", completion="anchored") == 2
    assert "another model, other data or other options" in capsys.readouterr().err


@pytest.mark.parametrize("completion", ["anchored", "pages"])
def test_offsets_lower_the_held_out_error_and_are_used(text, tmp_path, completion):
    file = tmp_path / "offsets"
    assert calibrate(text, file, completion=completion) == 0
    layers = read_calibration(file, completion).header.layers
    output, start = (sum(figures[name] for figures in layers.values()) for name in ("output", "start_output"))
    assert output < start
    offsets = load_file(file)
    moved = [float((offsets[f"layers.{layer}.offset"] != 0).float().mean()) for layer in range(N_LAYERS)]
    assert moved == pytest.approx([figures["moved"] for figures in layers.values()])
    assert sum(moved) > 0
    assert RuntimeConfig(completion=f"{completion}:file={file}").completion[0].calibration is not None


def test_what_offsets_are_reported_on_has_no_part_in_choosing_them(tmp_path):
    """Two texts whose last sequence alone differs."""
    offsets, figures = [], []
    for ending in ("the quick brown fox jumps over a lazy dog and ", "0123456789 "):
        text, file = tmp_path / "text", tmp_path / f"offsets{len(offsets)}"
        words = random.Random(0).choices(WORDS.split(), k=500)
        text.write_text(" ".join(words)[: 3 * 192] + (ending * 192)[:192])
        assert calibrate(text, file, completion="anchored") == 0
        offsets.append(load_file(file))
        figures.append(read_calibration(file, "anchored").header.layers[0]["output"])
    assert all(torch.equal(offset, offsets[1][name]) for name, offset in offsets[0].items())
    assert figures[0] != figures[1]


def test_the_report_is_one_json_object(text, tmp_path, capsys):
    assert calibrate(text, tmp_path / "o", "--json", completion="pages") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["completion"] == "pages"
    assert list(report["layers"]) == [str(layer) for layer in range(N_LAYERS)]
    assert report["layers"]["0"]["output"] > 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--completion", "none"], "cannot be calibrated; accepted: phi, anchored, pages"),
        (["--completion", "phi+anchored", "--gate"], "No such option"),
        (["--family", "fourier"], "family: 'fourier' is unknown; accepted: exp, hedgehog"),
        (["--family", "hedgehog", "--features", "15"], "15 is odd"),
        (["--context", "96", "--page-size", "16", "--recent", "64"], r"leave \d+ pages of 16"),
        (["--context", "1m"], "beyond the model's 8192"),
        (["--sequences", "1"], "sequences"),
        (["--sequences", "2", "--completion", "pages"], "sequences: 2 are too few.*at least 3"),
        (["--sequences", "4000"], "sequences of 192 tokens and 4000 are wanted"),
        (["--data", "missing.txt"], "'missing.txt' cannot be read"),
        (["--budgets", "many"], "budgets"),
        (["--rate", "0"], "rate"),
        (["--budget", "2%"], "budget: only --by-layer looks at it"),
    ],
)
def test_bad_input_is_refused_before_the_weights_load(text, tmp_path, capsys, monkeypatch, flags, told):
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    base = ["calibrate", "--completion", "phi", "--model", "tiny", "--data", str(text), "--out", str(tmp_path / "o")]
    assert cli.run([*base, *SMALL, *ANCHORS, *flags]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_a_file_that_is_there_is_not_overwritten(text, tmp_path, capsys):
    (tmp_path / "o").write_text("mine")
    assert calibrate(text, tmp_path / "o") == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "o").read_text() == "mine"
