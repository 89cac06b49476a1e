"""Large host memory lies in huge pages where the system has them."""

import mmap
from pathlib import Path

import pytest
import torch
from kvoffload_storage import aligned, aligned_empty
from kvoffload_storage.aligned import BLOCK_BYTES, HUGE_BYTES


def asks_for_huge_pages(memory: torch.Tensor) -> bool:
    """What the system says of the mapping in which the memory begins."""
    inside = False
    for name, *rest in map(str.split, Path("/proc/self/smaps").read_text().splitlines()):
        if not name.endswith(":"):
            low, high = (int(address, 16) for address in name.split("-"))
            inside = low <= memory.data_ptr() < high
        elif inside and name == "VmFlags:":
            return "hg" in rest
    return False


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here")
@pytest.mark.parametrize("n_bytes", [HUGE_BYTES, 40_000_001])
def test_large_memory_begins_where_a_huge_page_does_and_asks_for_them(n_bytes: int) -> None:
    memory = aligned_empty(n_bytes)
    assert (len(memory), memory.data_ptr() % HUGE_BYTES) == (n_bytes, 0)
    assert asks_for_huge_pages(memory)


@pytest.mark.parametrize(("n_bytes", "pinned"), [(HUGE_BYTES - 1, False), (HUGE_BYTES, True)])
def test_small_and_pinned_memory_is_left_as_it_comes(
    n_bytes: int, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = torch.zeros(2 * HUGE_BYTES, dtype=torch.uint8)
    monkeypatch.setattr(torch, "empty", lambda n_bytes, **_: source[:n_bytes])
    monkeypatch.setattr(aligned, "_libc", None)
    memory = aligned_empty(n_bytes, pinned=pinned)
    assert (len(memory), memory.data_ptr() % BLOCK_BYTES) == (n_bytes, 0)
    assert memory.data_ptr() - source.data_ptr() < BLOCK_BYTES


def test_a_system_without_huge_pages_gives_large_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert len(aligned_empty(HUGE_BYTES)) == HUGE_BYTES
