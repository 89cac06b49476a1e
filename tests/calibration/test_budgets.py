"""``calibrate --by-layer``: the divergences it measures, and their use."""

import pytest
import torch
from divergence import DivergenceTask

from kvoffload import cli
from kvoffload.calibration import budgets, command
from kvoffload.completion.calibrated import read_all
from kvoffload.config import RuntimeConfig
from kvoffload.layer_budgets import LADDER
from kvoffload.models.catalog import load_model, resolve

ANCHORS = {"sinks": 4, "recent": 8, "page_size": 4}
FLAGS = [part for name, value in ANCHORS.items() for part in ("--" + name.replace("_", "-"), str(value))]


def by_layer(text, out, *more, quiet=True):
    base = ["calibrate", "--by-layer", "--model", "tiny", "--data", str(text), "--out", str(out)]
    sizes = ["--context", "200", "--sequences", "2", "--budget", "10%", "--device", "cpu"]
    return cli.run([*base, *sizes, *FLAGS, *["--quiet"] * quiet, *more])


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


def test_a_run_interrupted_while_measuring_goes_on_to_the_same_file(text, tmp_path, monkeypatch):
    assert by_layer(text, tmp_path / "whole.st") == 0
    curves, begun = budgets._curves, []

    def cut_short(model, ids, *rest):
        begun.append(ids)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return curves(model, ids, *rest)

    monkeypatch.setattr(budgets, "_curves", cut_short)
    assert by_layer(text, tmp_path / "cut.st") == 130
    assert {file.name for file in tmp_path.iterdir()} == {"whole.st", "cut.st.partial"}
    assert by_layer(text, tmp_path / "cut.st") == 0
    assert len(begun) == 3  # the first sequence is not measured again
    assert (tmp_path / "cut.st").read_bytes() == (tmp_path / "whole.st").read_bytes()


def test_progress_is_told_for_every_sequence(text, tmp_path, capsys):
    assert by_layer(text, tmp_path / "b.st", quiet=False) == 0
    told = capsys.readouterr().err
    assert [line.partition(":")[0] for line in told.splitlines() if "KL" in line] == [
        "sequence 1 of 2",
        "sequence 2 of 2",
    ]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--budgets", "1%"], "budgets: --by-layer measures under --budget and learns nothing; leave it out"),
        (["--features", "64", "--family", "exp", "--steps", "300"], "features, family, steps: --by-layer"),
        (["--context", "30"], "30 tokens leave 2 pages of 4 between 4 sinks and the window before the last two pages"),
    ],
)
def test_what_would_have_no_effect_is_refused(text, tmp_path, capsys, monkeypatch, flags, told):
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    assert by_layer(text, tmp_path / "b.st", *flags) == 2
    assert told in capsys.readouterr().err
