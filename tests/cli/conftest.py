"""Set-up for the tests of commands and configuration."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from session_runs import LONG, TINY

from kvoffload import cli
from kvoffload.runtime import command


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No KVOFFLOAD_ variable of the user's is seen."""
    for name in [name for name in os.environ if name.startswith("KVOFFLOAD_")]:
        monkeypatch.delenv(name)


class Ran:
    """What a command line gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def kvoffload(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Ran:
        code = cli.run(arguments)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Ran:
        code = cli.run([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def session(run: Any, tmp_path: Path) -> Path:
    """A saved session of a prompt and five tokens."""
    path = tmp_path / "a.kvo"
    assert run(*TINY, "--session", path, "-p", LONG, "--max-new-tokens", 5).code == 0
    return path


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(command, "load_model", load)
