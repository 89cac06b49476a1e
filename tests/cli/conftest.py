"""Set-up for the tests of commands and configuration."""

import os
from typing import Any

import pytest

from kvoffload import cli


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No KVOFFLOAD_ variable of the user's is seen."""
    for name in [name for name in os.environ if name.startswith("KVOFFLOAD_")]:
        monkeypatch.delenv(name)


class Ran:
    """What a command line gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def kvoffload(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Ran:
        code = cli.run(arguments)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run
