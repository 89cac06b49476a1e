"""Set-up for the tests of commands and configuration."""

import os

import pytest
import torch
import torch.utils._device

# torch collects the functions that a ``with torch.device(...)`` block redirects once, on first use. That has to happen
# before ``torch.empty`` is poisoned, or the block has no effect on it and shapes on "meta" are really allocated.
torch.utils._device._device_constructors()

torch.set_num_threads(1)  # the models are tiny: threads only wait for each other, ten times as long on a busy machine


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No KVOFFLOAD_ variable of the user's is seen."""
    for name in [name for name in os.environ if name.startswith("KVOFFLOAD_")]:
        monkeypatch.delenv(name)
