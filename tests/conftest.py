"""Shared set-up: kernels run in triton's interpreter, and uninitialised memory is poisoned."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import pytest
import torch
import torch.utils._device
from interpreter import hasten

hasten()

# torch collects the functions that a ``with torch.device(...)`` block redirects once, on first use. That has to happen
# before ``torch.empty`` is poisoned, or the block has no effect on it and shapes on "meta" are really allocated.
torch.utils._device._device_constructors()

torch.set_num_threads(1)  # the models are tiny: threads only wait for each other, ten times as long on a busy machine


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN (or 0xFF), so that a missed write is seen."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "meta":
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(0xFF) if tensor.dtype == torch.uint8 else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))


@pytest.fixture
def short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes and sketches are fitted to 64 tokens, so that a short prompt is enough for every kind."""
    for module in ("index.transform", "selection.transform", "completion.sketch"):
        monkeypatch.setattr(f"kvoffload.{module}.FIT_TOKENS", 64)
