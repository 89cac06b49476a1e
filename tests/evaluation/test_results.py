"""Samples on disk survive whatever ends a process."""

from dataclasses import replace

import pytest

from kvoffload.errors import UsageError
from kvoffload.evaluation.results import Result, appending, read_results, results_file
from kvoffload.evaluation.spec import Shard

ONE = Result(
    family="f", key="k", sample="a", model="m", task="kl", context=8, seed=0, commit="c", cell={"method": "x"},
    values={"kl": 0.5}, n=3, heads={}, cost=None,
)  # fmt: skip


def add(folder, results, shard=Shard()):  # noqa: B008 - frozen
    with appending(results_file(folder, shard)) as out:
        out.add(results)


def test_what_was_added_is_read(tmp_path):
    add(tmp_path / "new" / "folder", [ONE, replace(ONE, sample="b")])
    assert read_results(tmp_path / "new" / "folder") == [ONE, replace(ONE, sample="b")]


def test_every_line_is_on_disk_at_once(tmp_path):
    with appending(results_file(tmp_path, Shard())) as out:
        out.add([ONE])
        assert read_results(tmp_path) == [ONE]


def test_a_half_written_line_is_dropped_and_written_over(tmp_path):
    add(tmp_path, [ONE])
    file = results_file(tmp_path, Shard())
    file.write_bytes(file.read_bytes() + b'{"family": "f", "k')
    assert read_results(tmp_path) == [ONE]
    add(tmp_path, [replace(ONE, sample="b")])
    assert [r.sample for r in read_results(tmp_path)] == ["a", "b"]


def test_parts_write_files_of_their_own_and_all_are_read(tmp_path):
    add(tmp_path, [ONE], Shard(1, 2))
    add(tmp_path, [replace(ONE, sample="b"), replace(ONE, values={"kl": 9.0})], Shard(2, 2))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["samples-1of2.jsonl", "samples-2of2.jsonl"]
    assert [(r.sample, r.values["kl"]) for r in read_results(tmp_path)] == [("a", 0.5), ("b", 0.5)]


def test_two_processes_cannot_write_one_file(tmp_path):
    with appending(results_file(tmp_path, Shard())), pytest.raises(UsageError, match="another process"):
        add(tmp_path, [ONE])


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        add(tmp_path / "file", [ONE])


def test_a_foreign_line_is_named(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"kl": 1}\n')
    with pytest.raises(UsageError, match=r"samples\.jsonl' line 1"):
        read_results(tmp_path)
