"""``kvoffload chat``: answers, commands and refusals, by driving its input."""

import io
import re
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from kvoffload import cli
from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.models.catalog import load_model, resolve
from kvoffload.runtime import chat
from kvoffload.runtime.engine import Runtime
from kvoffload.settings import load_settings

SMALL = {"sinks": 4, "recent": 8, "page_size": 4, "budget": "20%", "self_test": False}
LINES = ["Tell me of rivers and of the sea, at some length. " * 3, "And of the mountains."]


@pytest.fixture(scope="module")
def loaded():
    return load_model(resolve("tiny"), dtype="float32", device="cpu")


@pytest.fixture
def talk(loaded, monkeypatch):
    """Lines in; exit code, stdout and stderr out."""
    monkeypatch.setattr(chat, "load_model", lambda *_, **__: loaded)

    def run(*lines, **fields):
        settings = load_settings({"model": "tiny", "max_new_tokens": 8} | SMALL | fields)
        out, err = io.StringIO(), io.StringIO()
        console = Console(file=err, highlight=False, width=200)
        code = chat.run_chat(settings, io.StringIO("".join(f"{line}\n" for line in lines)), out, console)
        return code, out.getvalue(), err.getvalue()

    return run


def expected(loaded, *lines, n=8):
    """What a session answers to the same texts one after the other."""
    with Runtime(loaded, RuntimeConfig(**SMALL)).session() as session:
        answers = []
        for line in lines:
            session.prefill(list(loaded.tokenizer(line).input_ids))
            answers.append(session.generate(SamplingConfig(max_new_tokens=n)))
        return answers, session.token_ids


def said(answers):
    return "".join(answer + ("" if answer.endswith("\n") else "\n") for answer in answers)


def test_every_line_is_answered_behind_those_before_it(talk, loaded):
    assert talk(LINES[0], "", LINES[1])[:2] == (0, said(expected(loaded, *LINES)[0]))


def test_quit_ends_it_and_two_slashes_say_one(talk, loaded):
    assert talk("//quit", "/quit", LINES[0])[1] == said(expected(loaded, "/quit")[0])


def test_stats_tell_what_was_read_and_a_budget_changes_it(talk):
    _, _, err = talk(LINES[0], "/stats", "/budget", "/budget 100%", "/budget", LINES[1], "/stats")
    shares = [float(share) for share in re.findall(r"\(([\d.]+)% of the context\)", err)]
    assert shares[0] < 20.1 < shares[1]
    assert re.findall(r"^budget .*", err, re.MULTILINE) == ["budget 20% a step"] + ["budget 100% a step"] * 2


def test_a_saved_chat_goes_on_in_another_one(talk, loaded, tmp_path):
    path = tmp_path / "a.kvo"
    code, _, err = talk(LINES[0], f"/save {path}", "/save")
    assert (code, err.count(f"saved {path}: ")) == (0, 2)
    answers, token_ids = expected(loaded, *LINES)
    code, out, err = talk(LINES[1], "/quit", session=path)
    assert (code, out) == (0, said(answers[1:]))
    assert "going on behind" in err
    with Runtime(loaded, RuntimeConfig(**SMALL)).restore(path) as session:
        assert session.token_ids == token_ids, "--session is saved at the end"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/nothing", "/nothing is no command; commands: /save"),
        ("/budget much", "'much' is not a budget"),
        ("/save", "needs a name that ends in .kvo"),
        ("/save x.txt", "needs a name that ends in .kvo"),
        ("/save {tmp}/there.kvo", "exists already"),
        ("/save {tmp}/no/such/folder.kvo", "no/such' is not a folder"),
        ("/save /proc/x.kvo", "/proc: cannot"),
        ("\udcff", "not UTF-8"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_chat_goes_on(talk, loaded, tmp_path, line, told):
    (tmp_path / "there.kvo").mkdir()
    code, out, err = talk(LINES[0], line.format(tmp=tmp_path), LINES[1])
    assert (code, out) == (0, said(expected(loaded, *LINES)[0]))
    errors = [each for each in err.splitlines() if each.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]


def test_nothing_is_saved_of_nothing(talk, tmp_path):
    assert "nothing was said" in talk(f"/save {tmp_path}/a.kvo")[2]
    assert talk(session=tmp_path / "b.kvo")[0] == 0
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--budget", "200%"], "200%"), (["--session", "x.txt"], "x.txt"), (["--model", "no-such"], "no-such"),
     (["--session", "no.kvo", "--session-readonly"], "is not there")],
)  # fmt: skip
def test_bad_flags_are_refused_before_weights_load(monkeypatch, capsys, arguments, told):
    monkeypatch.setattr(chat, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    assert cli.run(["chat", "--model", "tiny", *arguments]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def told(process, word):
    """Wait for a line of stderr with this word."""
    while word not in (line := process.stderr.readline()):
        assert line, "it ended"


def test_ctrl_c_ends_an_answer_and_not_the_chat():
    program = [sys.executable, "-m", "kvoffload", "chat", "-m", "tiny", "--max-new-tokens", "4000", "--no-self-test"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen(program, **pipes) as process:
        try:
            for line in (b"first\n", b"second\n"):
                process.stdin.write(line)
                assert process.stdout.read(1), "an answer has begun"
                process.send_signal(signal.SIGINT)
                told(process, b"cancelled")
                process.stdin.write(b"/budget\n")
                told(process, b"budget")
                process.stdout.read(1 << 20)  # all of the first answer is there by now
            process.stdin.write(b"/stats\n/quit\n")
            assert process.wait(60) == 0
            assert b"prompt tok" in process.stderr.read()
        finally:
            process.kill()
