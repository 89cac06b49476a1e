"""``kvoffload sweep --ray`` on a local cluster gives what one process gives."""

import json
from pathlib import Path

import pytest

from kvoffload import cli
from kvoffload.errors import UsageError
from kvoffload.evaluation import cluster as ray_sweep
from kvoffload.evaluation.cluster import merged

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """A small sweep, told with relative paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("".join(f"{i} little pigs went to market. " for i in range(400)))
    return [
        "sweep", "--model", "tiny", "--task", "kl:texts=2", "--positions", "8", "--text", "book.txt",
        "--contexts", "200", "--budgets", "10%,20%", "--selectors", "bounds", "--completions", "none",
        "--page-size", "4", "--no-plots",
    ]  # fmt: skip


def rows(folder):
    measured = json.loads((folder / "sweep.json").read_text())
    return [{name: value for name, value in row.items() if name != "commit"} for row in measured]


def test_a_sweep_over_a_cluster_gives_what_one_process_gives(cluster, arguments, tmp_path, capsys):
    assert cli.run([*arguments, "--out", "one"]) == 0
    assert cli.run([*arguments, "--out", "several", "--ray", "--parts", "2"]) == 0
    assert rows(tmp_path / "several") == rows(tmp_path / "one")
    files = sorted(path.name for path in (tmp_path / "several").glob("samples*.jsonl"))
    assert files == ["samples-1of2.jsonl", "samples-2of2.jsonl", "samples.jsonl"]
    assert (tmp_path / "several/samples.jsonl").read_text() == ""  # nothing was left for the report
    assert "part 2/2 is done" in capsys.readouterr().err


def test_an_error_of_a_part_is_told_in_one_line(cluster, arguments, capsys):
    broken = ["text.txt" if word == "book.txt" else word for word in arguments]
    Path("text.txt").write_text("too short")
    assert cli.run([*broken, "--out", "broken", "--ray", "--parts", "1"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    assert "Traceback" not in err[-1]


def test_one_part_beside_ray_is_refused(arguments):
    assert cli.run([*arguments, "--out", "x", "--ray", "--shard", "1/2"]) == 2


def test_without_ray_the_extra_is_named(arguments, monkeypatch, capsys):
    monkeypatch.setattr(ray_sweep, "find_spec", lambda name: None)
    assert cli.run([*arguments, "--out", "x", "--ray"]) == 2
    assert "pip install 'kvoffload[ray]'" in capsys.readouterr().err


def test_paths_mean_the_same_on_every_node(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.toml").write_text('out = "from-file"\ntext = ["a.txt", "/b.txt"]\nseed = 3\n')
    given = merged({"out": None, "seed": 4}, tmp_path / "sweep.toml")
    assert given == {"out": str(tmp_path / "from-file"), "text": [str(tmp_path / "a.txt"), "/b.txt"], "seed": 4}
    with pytest.raises(UsageError):
        merged({}, tmp_path / "none.toml")
