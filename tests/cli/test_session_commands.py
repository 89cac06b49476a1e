"""``--session`` and ``kvoffload session``, run as a user runs them."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import xxhash
from kvoffload_storage.disk import keep_read_unit
from kvoffload_storage.locks import claim_name
from kvoffload_storage.manifests import read_manifest, replace_manifest
from session_runs import LONG, ONCE, SOME, TINY

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.runtime import command
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.session import Session


def test_auto_takes_the_page_size_of_the_session(run: Any, session: Path, tmp_path: Path) -> None:
    keep_read_unit(tmp_path, 1 << 20)
    auto = [*TINY[:5], "--page-size", "auto", *TINY[7:], "--nvme-dir", tmp_path, "--max-new-tokens", 1]
    told = run(*auto, "--session", session).json
    assert (told["config"]["page_size"], told["read_unit"]) == (4, 1 << 20)
    assert run(*auto, "--session", tmp_path / "new.kvo", "-p", LONG).json["config"]["page_size"] == 64


def test_a_session_is_made_then_gone_on_with(run: Any, session: Path) -> None:
    n_first = len(LONG)
    again = run(*TINY, "--session", session, "-p", "and then", "--max-new-tokens", 5)
    assert (again.code, again.err) == (0, "")
    assert again.json["restored_tokens"] == n_first + 4
    assert again.json["computed_tokens"] == 1 + len("and then") + 4
    assert run("session", "inspect", session, "--json").json["tokens"] == n_first + 5 + len("and then") + 5


@pytest.fixture
def killed(run: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command line that ends without a word when it has the first token of its answer."""

    def kill(*arguments: object) -> Any:
        def die(session: Session, *_: object) -> None:
            next(iter(session.stream()))
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(command, "_stream", die)
            return run(*arguments)

    return kill


def n_tokens(run: Any, path: Path) -> int:
    return int(run("session", "inspect", path, "--json").json["tokens"])


def test_a_command_that_was_killed_while_it_answered_goes_on(
    run: Any, killed: Any, session: Path, tmp_path: Path
) -> None:
    ask, fork = [*ONCE, "-p", "and then", "--session", session], tmp_path / "b.kvo"
    assert run("session", "fork", session, fork).code == 0
    assert killed(*ask).code == 130
    again, expected = run(*ask), run(*ask[:-1], fork)
    assert again.json["text"] == expected.json["text"]
    assert n_tokens(run, session) == n_tokens(run, fork)
    deliberate = run(*ask)
    assert deliberate.json["prompt_tokens"] == expected.json["prompt_tokens"] + len("and then")


def test_a_first_prompt_is_in_the_session_once_too(run: Any, killed: Any, tmp_path: Path) -> None:
    ask = [*ONCE, "-p", "a book", "--session", tmp_path / "a.kvo"]
    assert killed(*ask).code == 130
    assert run(*ask).json["prompt_tokens"] == len("a book")
    assert n_tokens(run, tmp_path / "a.kvo") == len("a book") + 3


@pytest.mark.parametrize("prompt", ["so", "and then they"])
def test_after_a_killed_answer_another_prompt_comes_behind_it(
    run: Any, killed: Any, session: Path, prompt: str
) -> None:
    before = n_tokens(run, session)
    assert killed(*ONCE, "--session", session, "-p", "and then").code == 130
    assert run(*ONCE, "--session", session, "-p", prompt).code == 0
    assert n_tokens(run, session) == before + len("and then") + len(prompt) + 3


@pytest.mark.parametrize(
    ("command", "bound"),
    [
        *itertools.product(["upgrade", "import", "fork"], [("--nvme-max", "100K"), ("--nvme-floor", "100T")]),
        ("export", ("--nvme-floor", "100T")),
    ],
)
def test_no_room_is_exit_code_3_and_changes_nothing(
    run: Any, session: Path, tmp_path: Path, command: str, bound: tuple[str, str]
) -> None:
    assert run("session", "export", session, tmp_path / "x.tar").code == 0
    before = sorted(tmp_path.rglob("*"))
    source = {"upgrade": [], "import": [tmp_path / "x.tar"]}.get(command, [session])
    target = session if command == "upgrade" else tmp_path / "b.kvo"
    ran = run("session", command, *source, target, *bound)
    assert (ran.code, ran.err.count("\n")) == (3, 1), ran.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_prompt_that_does_not_fit_the_disk_leaves_the_session(run: Any, session: Path) -> None:
    before = {path: path.read_bytes() for path in session.rglob("*") if path.is_file()}
    (session.parent / "other.kvo").mkdir()
    (session.parent / "other.kvo" / "pages").write_bytes(bytes(3 << 19))
    bounds = ["--nvme-max", "2800K", "--nvme-dir", session.parent, "--prefill-chunk", 40]
    ran = run(*ONCE, "--session", session, "-p", LONG, *bounds)
    assert (ran.code, ran.err.count("\n")) == (3, 1), ran.err
    assert "the cap is" in ran.err
    assert {path: path.read_bytes() for path in session.rglob("*") if path.is_file()} == before
    assert run(*ONCE, "--session", session, "-p", "another").code == 0


@pytest.mark.usefixtures("no_weights")
def test_a_session_that_another_process_makes_is_refused_before_weights_load(run: Any, tmp_path: Path) -> None:
    claim = claim_name(tmp_path / "a.kvo")
    ran = run(*ONCE, "--session", tmp_path / "a.kvo", "-p", "x")
    assert (ran.code, ran.err) == (2, f"error: {tmp_path / 'a.kvo'}: another process is making this session\n")
    claim.release()
    assert list(tmp_path.iterdir()) == []


def test_asking_nothing_goes_on_with_the_answer(run: Any, session: Path) -> None:
    whole = run(*TINY, "-p", LONG, "--max-new-tokens", 10)
    more = run(*TINY, "--session", session, "--max-new-tokens", 5)
    assert more.json["prompt_tokens"] == len(LONG)
    assert whole.json["text"].endswith(more.json["text"])


def test_a_readonly_session_is_left_as_it_is(run: Any, session: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in session.rglob("*")}
    answers = {run(*SOME, "--session", session, "--session-readonly", "-p", "why?").json["text"] for _ in range(2)}
    assert len(answers) == 1
    assert {path: path.stat().st_mtime_ns for path in session.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.kvo"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--session", "{dir}/a.bin", "-p", "x"], "does not end in .kvo"),
        (["--session", "{dir}/none.kvo", "--session-readonly", "-p", "x"], "is not there"),
        (["--session", "{dir}/none.kvo"], "the prompt is empty"),
        (["--session", "{dir}/no/where.kvo", "-p", "x"], "is not a folder"),
        (["--session-readonly", "-p", "x"], "session_readonly: give the session"),
        (["--session", "{dir}/a.kvo", "-p", "x", "--page-size", "8"], "page_size 4 (here 8)"),
        (["--session", "{dir}/a.kvo", "-p", "x", "--dtype", "bfloat16"], "dtype 'float32' (here 'bfloat16')"),
        (["--session", "{dir}/a.kvo", "-p", "x", "--nvme-floor", "much"], "nvme_floor"),
    ],
)
def test_what_cannot_be_is_told_in_one_line_before_weights_load(
    run: Any, tmp_path: Path, arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "a.kvo" in " ".join(arguments):
        assert run(*TINY, "--session", tmp_path / "a.kvo", "-p", LONG, "--max-new-tokens", 2).code == 0
    monkeypatch.setattr(command, "load_model", None)
    ran = run(*TINY, *[argument.replace("{dir}", str(tmp_path)) for argument in arguments])
    assert ran.code == 2
    assert complaint in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["inspect", "verify", "rm", "pin", "upgrade", "export", "fork", "generate"])
def test_a_session_of_another_version_is_refused_as_such(run: Any, tmp_path: Path, name: str) -> None:
    path, line = tmp_path / "a.kvo", b'{"format":"kvoffload-session","version":2,"new":[]}'
    path.mkdir()
    (path / "manifest.json").write_bytes(line + f"\n{xxhash.xxh3_64_hexdigest(line)}\n".encode())
    commands = {
        "generate": [*TINY, "--session", path, "-p", "x"],
        "export": ["session", "export", path, tmp_path / "x.tar"],
        "fork": ["session", "fork", path, tmp_path / "b.kvo"],
    }
    ran = run(*commands.get(name, ["session", name, path]))
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "session format version 2, this kvoffload reads version 1" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["a.kvo"]
    assert "unusable: " in run("session", "ls", tmp_path).out


def test_export_import_fork_and_upgrade_keep_what_is_said(run: Any, session: Path, tmp_path: Path) -> None:
    assert run(*TINY, "--session", session, "-p", "more", "--max-new-tokens", 2).code == 0
    tar, copy, fork = tmp_path / "x.tar", tmp_path / "b.kvo", tmp_path / "c.kvo"
    assert run("session", "fork", session, fork).code == 0
    assert run("session", "export", session, tar).code == 0
    assert run("session", "import", tar, copy).code == 0
    assert run("session", "upgrade", session).code == 0
    assert run("session", "inspect", session, "--json").json["segments"] == 1
    assert run("session", "inspect", fork, "--json").json["segments"] == 2
    asked = [run(*SOME, "--session", path, "-p", "so?").json for path in (session, copy, fork)]
    assert len({answer["text"] for answer in asked}) == 1
    assert run("session", "verify", session, copy, fork).code == 0
    listed = run("session", "ls", tmp_path, "--json").json["sessions"]
    assert [row["name"] for row in listed] == ["a.kvo", "b.kvo", "c.kvo"]
    assert run("session", "rm", session, copy, fork).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_an_export_that_was_tampered_with_is_not_imported(run: Any, session: Path, tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    assert run("session", "export", session, tar).code == 0
    whole = tar.read_bytes()
    page = next(session.glob("pages-*/layer-0001.kv")).read_bytes()[4096:4160]
    for at in (0, 300, 700, whole.index(page)):
        data = bytearray(whole)
        data[at] ^= 1
        tar.write_bytes(data)
        ran = run("session", "import", tar, tmp_path / "b.kvo")
        assert ran.code in (2, 4), (at, ran.err)
        assert ran.err.count("\n") == 1
    tar.write_bytes(whole[: len(whole) // 2])
    assert run("session", "import", tar, tmp_path / "b.kvo").code == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.kvo", "x.tar"]


def test_an_export_touches_no_other_file(run: Any, session: Path, tmp_path: Path) -> None:
    beside = tmp_path / "a.tar.tmp"
    beside.write_text("mine")
    assert run("session", "export", session, tmp_path / "a.tar").code == 0
    assert beside.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"a.kvo", "a.tar", "a.tar.tmp"}


@pytest.mark.parametrize(("field", "value"), [("n_tokens", "abc"), ("layers", None)])
def test_a_description_that_is_none_is_not_imported(
    run: Any, session: Path, tmp_path: Path, field: str, value: object
) -> None:
    manifest = read_manifest(session)
    replace_manifest(session, manifest.model_copy(update={"session": {**manifest.session, field: value}}))
    assert run("session", "export", session, tmp_path / "a.tar").code == 0
    ran = run("session", "import", tmp_path / "a.tar", tmp_path / "b.kvo")
    assert ran.code == 4
    assert f"session.{field}" in ran.err
    assert not (tmp_path / "b.kvo").exists()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("n_tokens",), 10**6),
        (("n_in_kv",), 3),
        (("prompt_tokens",), 10**9),
        (("prompt_start",), -1),
        (("prompt_end",), 10**9),
        (("fingerprint", "page_size"), 8),
        (("fingerprint", "dtype"), "float16"),
        (("layers", 0, "n_window"), 9),
        (("layers", 0, "n_tokens"), 7),
        (("layers", 0, "n_prefilled"), 10**6),
        (("layers", 1, "key_dim"), 8),
        (("sampling",), {"temperature": -1.0}),
    ],
)
def test_counts_that_do_not_fit_the_pages_are_not_imported(
    run: Any, session: Path, tmp_path: Path, where: tuple[Any, ...], value: object
) -> None:
    manifest = read_manifest(session)
    said = json.loads(json.dumps(manifest.session))
    inner = said
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    replace_manifest(session, manifest.model_copy(update={"session": said}))
    assert run("session", "verify", session).code == 4
    assert run("session", "export", session, tmp_path / "a.tar").code == 0
    ran = run("session", "import", tmp_path / "a.tar", tmp_path / "b.kvo")
    assert (ran.code, ran.err.count("\n")) == (4, 1)
    assert "a.tar" in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.kvo", "a.tar"]


def test_a_session_may_not_be_called_like_something_temporary(run: Any, session: Path, tmp_path: Path) -> None:
    assert run("session", "export", session, tmp_path / "a.tar").code == 0
    for made in (("import", tmp_path / "a.tar"), ("fork", session)):
        ran = run("session", *made, tmp_path / "kvoffload-new-mysession")
        assert ran.code == 2
        assert "end in .kvo" in ran.err


def test_pins_are_kept_by_later_saves(run: Any, session: Path) -> None:
    assert run("session", "inspect", session, "--json").json["pinned"] is True
    assert run("session", "unpin", session).code == 0
    assert run(*TINY, "--session", session, "-p", "more", "--max-new-tokens", 2).code == 0
    assert run("session", "inspect", session, "--json").json["pinned"] is False


@pytest.mark.parametrize("name", ["inspect", "verify", "rm", "pin", "upgrade"])
def test_a_session_that_is_not_there_is_bad_input(run: Any, tmp_path: Path, name: str) -> None:
    ran = run("session", name, tmp_path / "none.kvo")
    assert ran.code == 2, ran.err
    assert ran.err.count("\n") == 1


def test_a_session_that_another_process_changed_meanwhile_is_not_answered(
    run: Any, session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt was made for the tokens that were there, or for none."""
    load = command._load

    def meanwhile(*given: Any) -> Any:
        loaded = load(*given)
        with Runtime(loaded, fields(session)).open_session(session) as other:
            other.generate(SamplingConfig(max_new_tokens=2))
            other.save(session)
        return loaded

    before = read_manifest(session).session["n_tokens"]
    monkeypatch.setattr(command, "_load", meanwhile)
    asked = run(*ONCE, "--session", session, "-p", "and?")
    assert (asked.code, asked.out) == (2, "")
    assert "was changed by another process meanwhile" in asked.err
    assert read_manifest(session).session["n_tokens"] == before + 2


def fields(session: Path) -> RuntimeConfig:
    return RuntimeConfig(offload="nvme", nvme_dir=session.parent, page_size=4, recent=8)


@pytest.mark.parametrize("name", ["b", "a.kvo/b.kvo"])
def test_sessions_that_no_cap_would_count_are_refused(run: Any, session: Path, tmp_path: Path, name: str) -> None:
    run("session", "export", session, tmp_path / "a.tar")
    for words in (("fork", session, tmp_path / name), ("import", tmp_path / "a.tar", tmp_path / name)):
        assert run("session", *words).code == 2
    assert run(*ONCE, "--session", tmp_path / name, "-p", "x").code == 2
    assert not (tmp_path / name).exists()
