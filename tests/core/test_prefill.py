"""A prefill of one layer: its summaries from keys that are held, and the work that follows beside the next layer."""

from contextlib import contextmanager

import pytest
import torch
from layers import CPU, PAIRS, geometry, new_layer, step, tokens
from torch.testing import assert_close

from kvoffload.attention.behind import Behind
from kvoffload.attention.prefill import attend_chunk, prepare, take_in

N_PROMPT = 600  # indexes are fitted to so many


def prefilled(given, *, whole, padding=None, **fields):
    layer = new_layer(geometry(), **fields)
    layer.anchors.padding = padding
    take_in(layer, *(t[..., :N_PROMPT, :] for t in given), whole=whole)
    prepare(layer)
    return layer


@pytest.mark.parametrize("padding", [None, [3, 0, 9, 150]])
@pytest.mark.parametrize(("selector", "completion"), PAIRS)
def test_summaries_of_held_keys_are_those_of_the_store_to_the_bit(selector, completion, padding):
    given = tokens(geometry(), N_PROMPT + 3)
    padding = None if padding is None else torch.tensor(padding[: geometry().rows])
    fields = {"selector": selector, "completion": completion}
    held, stored = (prefilled(given, whole=whole, padding=padding, **fields) for whole in (True, False))
    for i in range(3):
        run = slice(N_PROMPT + i, N_PROMPT + i + 1)
        assert torch.equal(step(held, *given, run), step(stored, *given, run))
    assert held.n_prefilled == stored.n_prefilled > 0


@pytest.mark.parametrize("gate", [False, True])
def test_a_whole_prefill_reads_nothing_back_but_what_its_gate_tries(gate):
    given = tokens(geometry(), N_PROMPT)
    held, stored = (prefilled(given, whole=whole, gate=gate) for whole in (True, False))
    assert held.ready
    assert held.held is None
    moved, most = (layer.fetch.prefill.total().cpu for layer in (held, stored))
    assert most - moved >= held.n_pages * held.store.shape.page_bytes
    assert (moved == 0) is not gate


def test_a_chunk_that_is_not_the_whole_leaves_the_summaries_to_the_end():
    given = tokens(geometry(), N_PROMPT)
    layer = new_layer(geometry())
    take_in(layer, *(t[..., :300, :] for t in given), whole=False)
    assert not layer.ready
    take_in(layer, *(t[..., 300:, :] for t in given), whole=False)
    assert not layer.ready
    prepare(layer)
    assert layer.ready


def test_attention_alone_takes_nothing_in():
    given = tokens(geometry(), 40)
    layer = new_layer(geometry())
    first = attend_chunk(layer, *given)
    assert (layer.n_tokens, layer.n_pages) == (0, 0)
    assert_close(attend_chunk(layer, *given).output, first.output)


class TestBehind:
    def test_work_runs_when_the_next_follows_and_the_last_at_the_end(self):
        behind, done = Behind(), []
        made = (torch.zeros(1, device=CPU),)
        for i in range(3):
            behind.follow(lambda i=i: done.append(i), made)
            assert done == list(range(i))
        behind.finish()
        assert done == [0, 1, 2]
        behind.finish()
        assert done == [0, 1, 2]

    def test_on_a_gpu_work_is_ordered_behind_its_keys_and_before_what_follows_it(self, monkeypatch):
        log = []

        class Stream:
            device = "cuda"

            def __init__(self, name):
                self.name = name

            def __getattr__(self, call):
                return lambda *given: log.append((self.name, call, *(getattr(x, "name", x) for x in given)))

        class Made:
            is_cuda, device, name = True, "cuda", "keys"

            def record_stream(self, stream):
                log.append((self.name, "record_stream", stream.name))

        main = Stream("main")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: Stream("side"))
        monkeypatch.setattr(
            torch.cuda, "stream", contextmanager(lambda stream: iter([log.append(("on", stream.name))]))
        )
        behind = Behind()
        behind.follow(lambda: log.append("work"), (Made(),))
        assert log == [("main", "record_event"), ("keys", "record_stream", "side")]
        behind.finish()
        assert log[2:] == [("on", "side"), ("side", "wait_event", None), "work", ("main", "wait_stream", "side")]

    def test_work_that_failed_is_not_due_again(self):
        behind, done = Behind(), []
        made = (torch.zeros(1, device=CPU),)

        def fail():
            raise MemoryError("no room")

        behind.follow(fail, made)
        with pytest.raises(MemoryError, match="no room"):
            behind.follow(lambda: done.append(1), made)
        behind.finish()
        assert done == []
