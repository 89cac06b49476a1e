"""Sessions with damaged and lost files, met as a user meets them."""

import os
from pathlib import Path
from typing import Any

import pytest
from session_runs import ONCE, TINY


def damage(path: Path) -> None:
    file = next(path.glob("pages-*/layer-0001.kv"))
    data = bytearray(file.read_bytes())
    data[4096] ^= 1
    file.write_bytes(data)


def test_a_damaged_page_ends_with_exit_code_4(run: Any, session: Path) -> None:
    damage(session)
    verified = run("session", "verify", session)
    assert (verified.code, verified.err.count("\n")) == (4, 1)
    assert "layer 1, page 0, slice 0" in verified.err
    assert "1 damaged" in verified.out


@pytest.mark.usefixtures("no_weights")
def test_a_damaged_manifest_ends_with_exit_code_4(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.kvo"
    path.mkdir()
    (path / "manifest.json").write_text("{}")
    ran = run(*TINY, "--session", path, "-p", "x")
    assert (ran.code, ran.err.count("\n")) == (4, 1)
    assert "manifest.json: checksum" in ran.err


def test_verify_reads_the_others_where_one_is_missing(run: Any, session: Path, tmp_path: Path) -> None:
    damage(session)
    told = run("session", "verify", tmp_path / "no.kvo", session, "--json")
    reports = told.json["sessions"]
    assert told.code == 4
    assert "there is no such session" in reports[0]["error"]
    assert len(reports[1]["damaged"]) == 1
    assert run("session", "verify", tmp_path / "no.kvo").code == 2


@pytest.mark.parametrize("lose", [os.unlink, lambda file: os.truncate(file, 5000), lambda file: be_a_pipe(file)])
def test_a_lost_page_file_is_told_by_verify_and_mended_by_use(run: Any, session: Path, lose: Any) -> None:
    whole = run(*ONCE, "--session", session, "--session-readonly", "-p", "x").json
    lose(next(session.glob("pages-*/layer-0001.kv")))
    before = {path: path.lstat().st_mtime_ns for path in [session, *session.rglob("*")]}
    for name in ("verify", "upgrade"):
        ran = run("session", name, session)
        assert (ran.code, ran.err.count("\n")) == (4, 1)
        assert "layer-0001.kv: " in ran.err
    reader = run(*[flag for flag in ONCE if flag != "--quiet"], "--session", session, "--session-readonly", "-p", "x")
    assert reader.code == 0
    assert f"{reader.json['recomputed_pages']:,} lost or damaged pages were computed again" in reader.err
    assert reader.json["text"] == whole["text"]
    assert {path: path.lstat().st_mtime_ns for path in before} == before
    assert run(*ONCE, "--session", session, "-p", "x").json["text"] == whole["text"]
    assert run("session", "verify", session).code == 0


def be_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)
