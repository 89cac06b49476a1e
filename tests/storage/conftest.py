"""A file of blocks that tell where they are."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocks import BLOCK
from kvoffload_storage.format import PageLayout
from kvoffload_storage.page_file import PageFile


@pytest.fixture
def file(tmp_path: Path) -> Iterator[PageFile]:
    """100 blocks, block b filled with b."""
    path = tmp_path / "blocks"
    path.write_bytes(b"".join(bytes([b]) * BLOCK for b in range(100)))
    opened = PageFile(path, os.open(path, os.O_RDWR), PageLayout(1, BLOCK), direct=False)
    yield opened
    opened.close()
