"""The ``tiny`` shape behind a loopback port; skipped where the packages of the ``serve`` extra are not there."""

import os
from importlib.util import find_spec

import pytest

from kvoffload.models.catalog import load_model, resolve

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "httpx", "openai")  # pip install 'kvoffload[test]' brings them
collect_ignore_glob = ["test_*.py"] if any(find_spec(name) is None for name in _NEEDED) else []


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """No KVOFFLOAD_ variable of the user's is seen."""
    for name in [name for name in os.environ if name.startswith("KVOFFLOAD_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def loaded():
    return load_model(resolve("tiny"), dtype="float32", device="cpu")


@pytest.fixture
def serve(loaded):
    """Start a server with settings of its own."""
    from served import serving

    opened = []

    def start(**fields):
        context = serving(loaded, **fields)
        served = context.__enter__()
        opened.append(context)
        return served

    yield start
    for context in opened:
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def served(loaded):
    """One server for the tests that need nothing special."""
    from served import serving

    with serving(loaded) as running:
        yield running
