"""Shared steps as replays, with a recorder in the place of CUDA: what each sequence gets is what it gets alone."""

from contextlib import ExitStack

import pytest
import torch
from families import family_model
from kvoffload_storage.errors import CapacityError
from recorded import record

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.models.batch_graph import BatchSteps
from kvoffload.models.catalog import LoadedModel
from kvoffload.models.shapes import byte_tokenizer
from kvoffload.runtime.engine import Runtime

FIELDS = {
    "sinks": 4,
    "recent": 8,
    "page_size": 4,
    "selector": "quantized:group=16",
    "completion": "anchored:segments=5",
}
LENGTHS, BUDGETS, NEW, JOINS = (
    (140, 61, 90, 5),
    ("15%", "32", "100%", "25%"),
    (40, 34, 12, 30),
    {0: (0, 1), 4: (2,), 9: (3,)},
)
ROOM = 16


def runtime(**fields):
    model = family_model("llama")
    rt = Runtime(LoadedModel(model, byte_tokenizer(), "llama", model.config), RuntimeConfig(**(FIELDS | fields)))
    rt.__dict__["shared_steps"] = BatchSteps(model, record, room_tokens=ROOM)
    return rt


def prefilled(rt, stack, i):
    session = stack.enter_context(rt.session(budget=BUDGETS[i]))
    session.prefill(torch.randint(2, 90, (LENGTHS[i],), generator=torch.Generator().manual_seed(i)).tolist())
    return session


def sampling(i, **fields):
    return SamplingConfig(max_new_tokens=NEW[i], **fields)


def alone(rt, **fields):
    tokens, stats = [], []
    for i in range(len(NEW)):
        with ExitStack() as stack:
            session = prefilled(rt, stack, i)
            tokens.append([event.token for event in session.stream(sampling(i, **fields))])
            stats.append(session.stats())
    return tokens, stats


def together(rt, **fields):
    """Two begin, one joins after four steps and one after nine; who is done leaves."""
    tokens, stats, going, step = [[] for _ in NEW], [None] * len(NEW), {}, 0
    with ExitStack() as stack:
        while going or step == 0:
            for i in JOINS.get(step, ()):
                session = prefilled(rt, stack, i)
                going[i] = session, session.stream(sampling(i, **fields))
            rt.feed_ahead([session for session, _ in going.values()])
            for i, (session, stream) in list(going.items()):
                event = next(stream)
                tokens[i].append(event.token)
                if event.finish:
                    stats[i] = session.stats()
                    del going[i]
            step += 1
    return tokens, stats


@pytest.mark.parametrize(
    "fields", [{}, {"gpu_cache": "64KiB"}, {"offload": "none"}, {"reanchor": 17}, {"look_ahead": True}], ids=str
)
def test_replayed_shared_steps_are_the_steps_of_each_alone(fields):
    rt = runtime(**fields)
    given, expected = together(rt), alone(rt)
    assert rt.shared_steps.refusal == ""
    assert rt.shared_steps.n_replays > 12
    assert given[0] == expected[0]
    for mine, theirs in zip(given[1], expected[1], strict=True):
        for name in (
            "read_tokens_per_step",
            "charged_tokens_per_step",
            "hit_rate",
            "decode_bytes_read",
            "bytes_written",
        ):
            assert getattr(mine, name) == getattr(theirs, name), name


def test_who_samples_draws_what_it_draws_alone():
    rt = runtime()
    fields = {"temperature": 0.8, "top_k": 20, "seed": 5}
    assert together(rt, **fields)[0] == alone(rt, **fields)[0]
    assert rt.shared_steps.n_replays > 12


def test_files_take_plain_steps_beside_replays(tmp_path):
    rt = runtime(offload="nvme", nvme_dir=tmp_path, nvme_floor=0)
    assert together(rt)[0] == alone(rt)[0]
    assert rt.shared_steps.n_replays == 0


def test_who_has_no_more_room_fails_alone(monkeypatch):
    rt = runtime()
    expected = alone(rt)[0]
    with ExitStack() as stack:
        sessions = [prefilled(rt, stack, i) for i in range(2)]

        def full(layer, pages):
            raise CapacityError("the cap is reached")

        tokens = {id(session): [] for session in sessions}
        with pytest.raises(Exception, match="the cap is reached"):  # noqa: PT012 - after the others are done
            for session, event in rt.stream_together(sessions, SamplingConfig(max_new_tokens=20)):
                tokens[id(session)].append(event.token)
                if session is sessions[0] and len(tokens[id(session)]) == 6:
                    monkeypatch.setattr(session.cache.stores[0], "append", full)
    first, second = tokens.values()
    assert first == expected[0][: len(first)]
    assert 6 <= len(first) < 20
    assert second == expected[1][:20]
