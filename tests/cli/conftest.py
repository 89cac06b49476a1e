"""Set-up for the tests of commands and configuration."""

import os

import pytest


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No KVOFFLOAD_ variable of the user's is seen."""
    for name in [name for name in os.environ if name.startswith("KVOFFLOAD_")]:
        monkeypatch.delenv(name)
