"""An index in host memory that a GPU reads across the link: what is streamed, and what is told of it. The memory itself
is checked on a GPU (scripts/gpu-check)."""

import pytest
import torch
from heads import CPU, geometry, random_pages

from kvoffload import buffers
from kvoffload.attention.build import _selector as build_selector
from kvoffload.attention.build import build_layer
from kvoffload.cache.slots import Staging
from kvoffload.config import RuntimeConfig
from kvoffload.streamed import streamed_empty

SHAPE = geometry(key_dim=16, value_dim=16)


@pytest.fixture
def streamed(monkeypatch):
    """Sizes of what was asked for in host memory."""
    asked = []

    def empty(like, sizes):
        asked.append(tuple(sizes))
        return streamed_empty(like, sizes)

    monkeypatch.setattr(buffers, "streamed_empty", empty)
    return asked


def selector(**fields):
    from kvoffload_storage import MemoryStore, StoreShape

    config = RuntimeConfig(sinks=4, recent=8, page_size=SHAPE.page_size, **fields)
    store = MemoryStore(StoreShape(1, SHAPE.rows, SHAPE.slice_bytes), tier="cpu")
    like = torch.zeros(SHAPE.rows, 0, 16)
    staging = Staging(SHAPE.slice_bytes, CPU)
    return build_layer(config, SHAPE, store, 0, model_layer=0, staging=staging, keys=like, values=like).selector


@pytest.mark.parametrize("kind", ["quantized", "transform"])
def test_codes_of_tokens_are_streamed_and_told(kind, streamed):
    pages = random_pages(SHAPE, 160)
    here, away = (selector(selector=kind, completion="none") for _ in range(2))
    away.index.stream()
    here.absorb(pages)
    assert not streamed
    assert here.index.streamed_bytes == 0
    away.absorb(pages)
    assert streamed
    assert 0 < away.index.streamed_bytes <= away.resident_bytes


@pytest.mark.parametrize(("kind", "where"), [("quantized", "cuda"), ("transform", "cuda"), ("bounds", "cpu")])
def test_a_gpu_streams_codes_and_the_host_scores_the_rest(kind, where):
    config, gpu = RuntimeConfig(selector=kind, completion="none", index="cpu"), torch.device("cuda")
    found = build_selector(config, SHAPE, gpu)
    assert found.device.type == where
    assert (found.index is not None and found.index.streamed) == (where == "cuda")
    assert build_selector(config, SHAPE, CPU).device == CPU
    assert build_selector(config.model_copy(update={"index": "device"}), SHAPE, gpu).device == gpu


def test_numbers_of_pages_are_not(streamed):
    found = selector(selector="bounds", completion="none", index="cpu")
    found.absorb(random_pages(SHAPE, 160))
    assert found.device == CPU
    assert not streamed


def test_off_a_gpu_it_is_memory_like_any_other():
    like = torch.zeros(2, dtype=torch.float16)
    given = streamed_empty(like, (3, 0, 5))
    assert (given.shape, given.dtype) == ((3, 0, 5), torch.float16)
    assert streamed_empty(like, (3, 4)).fill_(1).sum() == 12


def test_room_that_a_buffer_has_is_told():
    buffer = buffers.Growing()
    buffer.append(torch.zeros(1, 800, 4))
    assert buffer.held_bytes == buffer.used_bytes == 800 * 16
    buffer.append(torch.zeros(1, 1, 4))
    assert (buffer.used_bytes, buffer.held_bytes) == (801 * 16, 900 * 16)
