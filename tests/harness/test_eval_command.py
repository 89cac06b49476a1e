"""``kvoffload eval``: one run end to end on local tasks, and what it refuses before any weights load."""

import json
from functools import partial
from importlib.util import find_spec

import pytest

if find_spec("lm_eval") is None:
    pytest.skip("lm-eval, the extra [eval], is not installed", allow_module_level=True)

import datasets

from kvoffload import cli
from kvoffload.harness import command, tasks

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports
SMALL = ["--sinks", "4", "--recent", "8", "--page-size", "4", "--budget", "20%"]


@pytest.fixture
def evaluate(capsys, task_folder):
    def run(*arguments):
        code = cli.run(["eval", "--model", "tiny", "--include", str(task_folder), *SMALL, *arguments])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


@pytest.fixture
def own_tasks(monkeypatch):
    """Without lm-eval's own tasks, of which there are many to look through."""
    monkeypatch.setattr(tasks, "CheckedTasks", partial(tasks.CheckedTasks, include_defaults=False))


@pytest.fixture
def refused(evaluate, own_tasks, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))

    def run(*arguments):
        code, out, err = evaluate(*arguments)
        assert (out, err[-1][:7]) == ("", "error: ")
        return code, err[-1]

    return run


def test_tasks_of_all_kinds_run_end_to_end(evaluate, tmp_path):
    code, out, _ = evaluate("--tasks", "kvo_choice,kvo_text,kvo_whole", "--json", "--out", str(tmp_path / "all.json"))
    assert code == 0
    told = json.loads(out.splitlines()[-1])
    assert set(told["results"]) == {"kvo_choice", "kvo_text", "kvo_whole"}
    assert 0 <= told["results"]["kvo_choice"]["acc,none"] <= 1
    assert told["results"]["kvo_whole"]["byte_perplexity,none"] > 1
    assert 0 < told["kvoffload"]["read_share"] <= 0.21
    kept = json.loads((tmp_path / "all.json").read_text())
    assert len(kept["samples"]["kvo_choice"]) == 3


def test_the_table_is_for_people_and_the_limit_holds(evaluate, own_tasks):
    code, out, _ = evaluate("--tasks", "kvo_choice", "--limit", "1")
    assert code == 0
    assert "|kvo_choice|" in out
    assert out.splitlines()[-1].startswith("read ")


def test_an_unknown_task_is_refused(refused):
    code, told = refused("--tasks", "kvo_choice,kvo_fly")
    assert (code, "'kvo_fly' is unknown to lm-eval" in told) == (2, True)


def test_no_task_is_refused(refused):
    assert refused()[0] == 2


def test_a_folder_that_is_none_is_refused(refused):
    code, told = refused("--tasks", "kvo_choice", "--include", "/none")
    assert (code, "'/none' is not a folder" in told) == (2, True)


def test_a_data_set_that_cannot_be_downloaded_is_one_line(refused, monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach 'some/data' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", load)
    code, told = refused("--tasks", "kvo_choice")
    assert code == 1
    assert "a data set cannot be downloaded or read: Couldn't reach 'some/data'" in told


def test_without_lm_eval_the_extra_is_named(refused, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert refused("--tasks", "kvo_choice")[1].endswith("pip install 'kvoffload[eval]'")
