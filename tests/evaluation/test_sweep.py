"""Whole sweeps of the tiny model: results, resumption, parts, and what is refused before weights load."""

import csv
import json
import re

import pytest
import torch
from divergence import DivergenceTask

from kvoffload import cli
from kvoffload.config import RuntimeConfig
from kvoffload.evaluation import command, plots
from kvoffload.evaluation.cells import Family, make_cells
from kvoffload.evaluation.results import read_results
from kvoffload.evaluation.spec import Shard, load_spec
from kvoffload.evaluation.sweep import share
from kvoffload.evaluation.tasks.kl import OpenKl
from kvoffload.models.catalog import load_model, resolve
from kvoffload.runtime.engine import Runtime

SMALL = {"page_size": 4, "sinks": 4, "recent": 8}
CONTEXT, POSITIONS = 120, 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    letters = torch.randint(97, 123, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text(bytes(letters).decode())
    return path


@pytest.fixture
def sweep(text, tmp_path, capsys):
    """Runs the command on one folder; gives exit code, the last line of stdout and stderr."""

    def run(*arguments, out=tmp_path / "out", task="kl"):
        fixed = ["--model", "tiny", "--task", task, "--text", str(text), "--contexts", str(CONTEXT), "--texts", "2",
                 "--positions", str(POSITIONS), "--out", str(out), "--json"]  # fmt: skip
        sizes = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        code = cli.run(["sweep", *fixed, *sizes, *arguments])
        stdout, stderr = capsys.readouterr()
        return code, json.loads(stdout.splitlines()[-1]) if stdout else {}, stderr

    return run


ONE = ("--budgets", "10%", "--methods", "bounds/none,quantized/anchored")


def rows(folder):
    return json.loads((folder / "sweep.json").read_text())


@pytest.fixture
def no_weights(monkeypatch):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(command, "load_model", load)


def test_a_sweep_gives_every_file_and_every_cell(sweep, tmp_path):
    code, told, stderr = sweep(*ONE)
    assert (code, told["measured"]) == (0, 6)
    assert re.search(r"^6/6 · 120 tok · .* · \d+\.\d s$", stderr, re.MULTILINE)
    out = tmp_path / "out"
    assert {f.name for f in out.iterdir()} == {"samples.jsonl", "sweep.json", "sweep.csv", "sweep.png", "report.md"}
    found = {(row["method"], row["metric"]) for row in rows(out)}
    assert found == {("dense", "ppl")} | {
        (m, k) for m in ("bounds/none", "quantized/anchored") for k in ("kl", "top1", "ppl")
    }
    with (out / "sweep.csv").open() as file:
        assert [line["metric"] for line in csv.DictReader(file)] == [row["metric"] for row in rows(out)]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_compared_is_told_once_and_in_the_report(sweep, tmp_path):
    told = "baseline 'bounds/none' is not among the methods"
    _, _, stderr = sweep("--budgets", "10%", "--methods", "transform/none", "--no-plots")
    assert stderr.count(f"warning: {told}") == 1
    assert f"- {told}" in (tmp_path / "out" / "report.md").read_text()
    _, _, stderr = sweep(*ONE, "--no-plots")
    assert "is not among" not in stderr + (tmp_path / "out" / "report.md").read_text()


def test_the_parts_of_the_positions_have_the_mean_of_all_of_them(sweep, tmp_path):
    code, _, _ = sweep("--budgets", "10%", "--methods", "bounds/none", "--no-plots", task="kl:parts=3")
    values = {row["metric"]: row["value"] for row in rows(tmp_path / "out") if row["method"] == "bounds/none"}
    parts = [values[f"kl_part{i}"] for i in (1, 2, 3)]
    assert code == 0
    assert len(set(parts)) == 3
    assert sum(parts) / 3 == pytest.approx(values["kl"])


def test_positions_that_cannot_be_cut_into_equal_parts_are_refused(sweep, no_weights):
    code, _, stderr = sweep(*ONE, task="kl:parts=4")
    assert code == 2
    assert f"positions: {POSITIONS} cannot be cut into 4 equal parts" in stderr


def test_the_figures_of_a_batch_are_those_of_its_texts_one_by_one(sweep, tmp_path, text):
    sweep(*ONE, "--batch", "2", "--no-plots")
    loaded = load_model(resolve("tiny"), dtype="float32", device="cpu")
    Runtime(loaded, RuntimeConfig())
    length = CONTEXT + POSITIONS
    ids = list(loaded.tokenizer(text.read_text()).input_ids)
    fields = {"budget": "10%", "selector": "quantized", "completion": "anchored"}
    kls, shares = [], []
    for i in range(2):
        task = DivergenceTask(
            loaded, ids[i * length : (i + 1) * length], n_steps=POSITIONS, anchors=RuntimeConfig(**SMALL)
        )
        found = task.measure(RuntimeConfig(**SMALL, **fields))
        task.close()
        kls.append(found.kl)
        shares.append((found.read_share, found.charged_share))
    (row,) = [r for r in rows(tmp_path / "out") if (r["method"], r["metric"]) == ("quantized/anchored", "kl")]
    assert row["value"] == pytest.approx(sum(kls) / 2, rel=1e-3)
    assert (row["read_share"], row["charged_share"]) == pytest.approx(shares[0])
    assert row["n"] == 2 * POSITIONS


def test_perplexity_of_a_full_budget_is_that_of_dense(sweep, tmp_path):
    sweep("--budgets", "100%", "--methods", "bounds/none", "--no-plots")
    ppl = {row["method"]: row["value"] for row in rows(tmp_path / "out") if row["metric"] == "ppl"}
    assert ppl["bounds/none"] == pytest.approx(ppl["dense"], rel=1e-4)


def test_what_is_there_is_not_measured_again(sweep, no_weights, monkeypatch, tmp_path):
    with monkeypatch.context() as before:
        before.setattr(command, "load_model", load_model)
        sweep(*ONE, "--no-plots")
    first = (tmp_path / "out" / "sweep.json").read_text()
    code, told, _ = sweep(*ONE, "--no-plots")
    assert (code, told["measured"]) == (0, 0)
    assert (tmp_path / "out" / "sweep.json").read_text() == first


def test_a_sweep_goes_on_where_it_was_stopped(sweep, tmp_path):
    sweep(*ONE, "--no-plots")
    whole = (tmp_path / "out" / "sweep.json").read_text()
    file = tmp_path / "out" / "samples.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    _, told, _ = sweep(*ONE, "--no-plots")
    assert told["measured"] == 3
    assert (tmp_path / "out" / "sweep.json").read_text() == whole


def test_an_interrupted_sweep_keeps_what_it_has(sweep, tmp_path, monkeypatch):
    measure, calls = OpenKl.measure, []

    def interrupted(self, config):
        calls.append(config)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, config)

    with monkeypatch.context() as now:
        now.setattr(OpenKl, "measure", interrupted)
        assert sweep(*ONE, "--no-plots")[0] == 130
    assert len(read_results(tmp_path / "out")) == 2  # dense and one method of the first text
    assert sweep(*ONE, "--no-plots")[1]["measured"] == 4


def test_parts_of_the_work_make_the_whole(sweep, tmp_path):
    parts = [sweep(*ONE, "--no-plots", "--shard", f"{i}/3")[1]["measured"] for i in (1, 2, 3)]
    assert sum(parts) == 6
    assert min(parts) > 0
    assert len(read_results(tmp_path / "out")) == 6
    assert sweep(*ONE, "--no-plots")[1]["measured"] == 0


@pytest.mark.parametrize(("n_batches", "count"), [(1, 4), (2, 4), (3, 4), (8, 3), (5, 1)])
def test_every_cell_is_done_by_one_part(n_batches, count):
    cells = list(range(7))
    done = [
        (b, c) for s in range(count) for b in range(n_batches) for c in share(cells, b, n_batches, Shard(s + 1, count))
    ]
    assert sorted(done) == [(b, c) for b in range(n_batches) for c in cells]


def test_more_methods_come_into_the_same_report(sweep, tmp_path):
    sweep(*ONE, "--no-plots")
    _, told, _ = sweep("--budgets", "10%", "--methods", "mean/none", "--no-plots")
    assert told["measured"] == 2
    assert {row["method"] for row in rows(tmp_path / "out")} == {
        "dense", "bounds/none", "quantized/anchored", "mean/none",
    }  # fmt: skip


def keys(text, **changed):
    flags = {
        "model": "tiny", "task": "kl", "text": [text], "contexts": "64", "budgets": "5%", "methods": "bounds/anchored",
        "out": "out", **changed,
    }  # fmt: skip
    spec = load_spec(flags, None)
    return Family.of(spec, "weights", "float32").cell_key(make_cells(spec)[1], spec.contexts[0])


@pytest.mark.parametrize(
    "changed",
    [
        {"positions": 9}, {"seed": 1}, {"contexts": "65"}, {"budgets": "6%"}, {"methods": "bounds/anchored@gate"},
        {"methods": "bounds/anchored@pool=none"}, {"methods": "bounds/anchored:segments=4"}, {"sinks": 8},
        {"methods": "mean/anchored"}, {"recent": 32}, {"page_size": 32}, {"offload": "none"}, {"set": ["index=cpu"]},
    ],
)  # fmt: skip
def test_whatever_changes_a_result_changes_its_key(text, changed):
    assert keys(text, **changed) != keys(text)


@pytest.mark.parametrize(
    "changed", [{"texts": 3}, {"batch": 2}, {"set": ["io_engine=aiofiles"]}, {"baseline": "mean/none"}]
)
def test_what_changes_no_result_changes_no_key(text, changed):
    assert keys(text, **changed) == keys(text)


def test_weights_and_dtype_are_in_the_key(text):
    flags = {"model": "tiny", "task": "kl", "text": [text], "contexts": "64", "budgets": "5%"}
    spec = load_spec(flags | {"methods": "bounds/none", "out": "out"}, None)
    cell = make_cells(spec)[1]
    found = {Family.of(spec, *of).cell_key(cell, 64) for of in (("a", "float32"), ("b", "float32"), ("a", "bfloat16"))}
    assert len(found) == 3


def test_output_errors_come_with_their_heads_and_a_picture(sweep, tmp_path):
    code, _, _ = sweep("--budgets", "10%", "--methods", "quantized/none,quantized/anchored", task="output")
    out = tmp_path / "out"
    assert code == 0
    assert (out / "entropy.png").read_bytes().startswith(b"\x89PNG")
    assert "By the heads' entropy" in (out / "report.md").read_text()
    found = {(r["method"], r["metric"]): r["value"] for r in rows(out)}
    assert found["quantized/none", "error"] == found["quantized/none", "selection_error"]
    assert ("quantized/none", "mass_error") not in found
    config = load_model(resolve("tiny"), dtype="float32", device="cpu").config
    (heads, *_) = [r.heads for r in read_results(out) if r.heads]
    assert len(heads["entropy"]) == config.num_hidden_layers * config.num_attention_heads


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--budgets", "10%", "--methods", "psychic/none"], "'psychic' is unknown"),
        (["--budgets", "10%"], "nothing to compare"),
        ([*ONE, "--contexts", "4k"], "the text is too short: 2 pieces of 4,102 tokens are needed (8,204 in all)"),
        ([*ONE, "--out", "/proc/nothing"], "cannot be written"),
        ([*ONE, "--task", "speed"], "'speed' is unknown"),
        ([*ONE, "--text", "nowhere.txt"], "'nowhere.txt' is no file"),
        ([*ONE, "--model", "gpt-17"], "'gpt-17' is unknown"),
    ],
)
def test_bad_input_is_one_line_before_any_weights_load(sweep, no_weights, arguments, told):
    code, _, stderr = sweep(*arguments)
    assert code == 2
    assert told in stderr.splitlines()[-1]


def test_plots_without_matplotlib_are_refused_first(sweep, no_weights, monkeypatch, tmp_path):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda _: None)
    code, _, stderr = sweep(*ONE)
    assert code == 2
    assert "--no-plots" in stderr
    assert not (tmp_path / "out").exists()


def test_policies_stand_side_by_side_with_and_without_completion(sweep, tmp_path):
    policies = "none,prhs:block=4;retro:window=3;resa:every=4;refresh;tokenselect;hshare"
    pairs = ("--selectors", "bounds", "--completions", "none,pages", "--policies", policies)
    code, _, stderr = sweep("--budgets", "10%", *pairs, "--set", "audit=2")
    assert code == 0, stderr
    found = {row["method"] for row in rows(tmp_path / "out")}
    assert {
        f"bounds/{c}@audit=2@policy={p}" for c in ("none", "pages") for p in ("resa:every=4", "refresh", "hshare")
    } < found
    assert len(found) == 1 + 14
    costs = [json.loads(line)["cost"] for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert all(0 < cost["dropped_mass"] < 1 and cost["scored_share"] >= 0 for cost in costs if cost is not None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--methods", "bounds/none@policy=nope"), "policy: 'nope' is unknown; accepted: prhs"),
        (("--methods", "bounds/none@policy=prhs:freeze_from=1"), "freeze_from changes the prefill"),
        (("--methods", "bounds/none@policy=retro:window=0"), "policy.retro.window: 0"),
        (("--methods", "bounds/none@max_dropped_mass=0.1"), "needs one completion"),
        (("--policies", "retro"), "write @policy= behind a method instead"),
    ],
)
def test_policies_that_cannot_be_compared_are_refused_before_weights_load(sweep, no_weights, arguments, told):
    code, _, stderr = sweep("--budgets", "10%", *arguments)
    assert (code, stderr.count("\n")) == (2, 1)
    assert told in stderr


def test_more_budgets_are_for_methods_with_neither_completion_nor_policy(tmp_path, text):
    methods = "bounds/none;bounds/pages;bounds/none@policy=prhs;bounds/none@gpu_cache=1M"
    flags = {"model": "tiny", "task": "kl", "text": [text], "contexts": "120", "budgets": "5%", "out": tmp_path}
    spec = load_spec({**flags, "methods": methods, "baseline_budgets": "10%,20%"}, None)
    assert [len(spec.budgets_of(method)) for method in spec.compared] == [3, 1, 1, 1]
