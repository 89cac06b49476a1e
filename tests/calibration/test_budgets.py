"""``calibrate --by-layer``: the divergences it measures, and their use."""

import pytest
import torch

from kvoffload import cli
from kvoffload.completion.calibrated import read_all
from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.divergence import DivergenceTask
from kvoffload.layer_budgets import LADDER
from kvoffload.models.catalog import load_model, resolve

ANCHORS = {"sinks": 4, "recent": 8, "page_size": 4}
FLAGS = [part for name, value in ANCHORS.items() for part in ("--" + name.replace("_", "-"), str(value))]


def by_layer(text, out, *more):
    base = ["calibrate", "--by-layer", "--model", "tiny", "--data", str(text), "--out", str(out), "--quiet"]
    sizes = ["--context", "200", "--sequences", "2", "--queries", "16", "--budget", "10%", "--device", "cpu"]
    return cli.run([*base, *sizes, *FLAGS, *more])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "words.txt"
    file.write_text(" ".join(f"{i * 7919 % 1000}" for i in range(400)))
    return file


def test_more_reads_of_a_layer_diverge_less_and_the_file_is_of_use(text, tmp_path, capsys):
    assert by_layer(text, tmp_path / "b.st") == 0
    assert "kl at 0.25" in capsys.readouterr().out
    curves = torch.stack(list(read_all(tmp_path / "b.st").values()))
    assert curves.shape == (4, len(LADDER))
    assert (curves.sum(0).diff() < 0).all()
    loaded = load_model(resolve("tiny"), dtype="float32", device="cpu")
    ids = loaded.tokenizer(text.read_text()).input_ids[:150]
    task = DivergenceTask(loaded, ids, n_steps=4, anchors=RuntimeConfig(offload="none", **ANCHORS))
    for budget, exact in (("10%", False), ("100%", True)):
        given = task.measure(RuntimeConfig(budget=budget, layer_budgets=tmp_path / "b.st", **ANCHORS))
        assert (given.kl < 1e-6) == exact
        assert given.read_share <= float(budget[:-1]) / 100 + 1e-9
    task.close()


def test_an_interrupted_run_goes_on_to_the_same_file(text, tmp_path, monkeypatch):
    from kvoffload.calibration.run import State

    assert by_layer(text, tmp_path / "whole.st") == 0
    add, added = State.add, []

    def twice(self, layer, result):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(layer)
        add(self, layer, result)

    with monkeypatch.context() as patched:
        patched.setattr(State, "add", twice)
        assert by_layer(text, tmp_path / "cut.st") == 130
    assert not (tmp_path / "cut.st").exists()
    assert by_layer(text, tmp_path / "cut.st") == 0
    assert (tmp_path / "cut.st").read_bytes() == (tmp_path / "whole.st").read_bytes()
