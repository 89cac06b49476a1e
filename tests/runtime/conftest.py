"""The built-in ``tiny`` shape, loaded once for the runtime and once as transformers gives it."""

import pytest
import torch
from tiny import SMALL, load

from kvoffload.config import RuntimeConfig
from kvoffload.models.catalog import LoadedModel
from kvoffload.runtime.engine import Runtime


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    """Its attention is ours from the first runtime on."""
    return load()


@pytest.fixture(scope="session")
def stock() -> LoadedModel:
    """The same weights; its attention stays the library's."""
    return load()


@pytest.fixture
def open_session(loaded):
    """Opens sessions with small pages and closes them."""
    opened = []

    def build(*, wrap=None, **fields):
        session = Runtime(loaded, RuntimeConfig(**(SMALL | fields))).session()
        if wrap is not None:
            session.cache.wrap_store = wrap
        opened.append(session)
        return session

    yield build
    for session in opened:
        session.close()


@pytest.fixture
def ids():
    """Token ids of any length, the same ones for the same length and seed."""

    def draw(n: int, seed: int = 0) -> list[int]:
        return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()

    return draw


@pytest.fixture
def runtime(loaded, tmp_path):
    """A runtime on the tiny model whose page files lie in a folder of their own."""

    def build(**fields):
        return Runtime(loaded, RuntimeConfig(**(SMALL | {"offload": "nvme", "nvme_dir": tmp_path / "pages"} | fields)))

    return build
