"""Sessions whose decode steps are replays of a captured graph, with a recorder in the place of CUDA."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kvoffload_storage.errors import CapacityError
from tiny import SMALL, load
from torch.testing import assert_close

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.errors import KvoffloadError, OutOfRoomError
from kvoffload.models.joined import find_joints
from kvoffload.models.parallel import Ranks
from kvoffload.runtime.engine import Runtime

sys.path.append(str(Path(__file__).parents[1] / "models"))
from recorded import record

N_PROMPT = 150
INDEXED = {"selector": "quantized:group=16"}


@pytest.fixture(autouse=True)
def _no_token_is_zero(loaded):
    """A query of zeros, such as the padding token's, finds all pages equal: which are read is chance then."""
    embedding = loaded.model.get_input_embeddings().weight.data
    kept = embedding[256].clone()
    embedding[256] = -embedding[0]
    yield
    embedding[256] = kept


@pytest.fixture
def pair(open_session, ids):
    """Two sessions with one prompt; the steps of the first are replayed."""

    def build(n_prompt=N_PROMPT, **fields):
        sessions = [open_session(**(INDEXED | fields)) for _ in range(2)]
        if fields.get("cuda_graph") != "off":
            sessions[0].replays.capture = record
        for session in sessions:
            session.prefill(ids(n_prompt))
        return sessions

    return build


def generated(session, n=20, **fields):
    before = len(session.token_ids)
    session.generate(SamplingConfig(max_new_tokens=n, **fields))
    return session.token_ids[before:]


SAMPLINGS = [
    {},
    {"temperature": 1.5, "seed": 3},
    {"temperature": 1.2, "top_p": 0.8, "seed": 3},
    {"temperature": 2.0, "top_k": 9, "seed": 4},
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_generation_by_replays_gives_the_same_tokens(pair, sampling):
    replayed, plain = pair()
    for _ in range(2):  # and goes on
        assert generated(replayed, **sampling) == generated(plain, **sampling)
    assert replayed.stats().graph_steps > 20
    assert plain.stats().graph_steps == 0


def test_a_step_by_a_replay_gives_the_same_logits(pair, ids):
    replayed, plain = pair()
    for token in ids(12, 1):
        assert_close(replayed.step(token), plain.step(token), atol=1e-4, rtol=1e-4)
    assert replayed.stats().graph_steps == 11


def test_counts_are_the_same(pair):
    replayed, plain = pair(gpu_cache="64KiB")
    assert generated(replayed) == generated(plain)
    given, expected = replayed.stats().as_dict(), plain.stats().as_dict()
    for name in ("ttft_s", "tpot_ms", "graph_steps", "resident_bytes", "completion_mass"):
        given.pop(name), expected.pop(name)
    assert given == expected


def test_anything_may_happen_between_replays(pair, ids):
    """Another prompt, a crop, a copy: a replay sees what it left."""
    replayed, plain = pair()
    for session in (replayed, plain):
        generated(session, 10)
        session.prefill(ids(30, 2))
        generated(session, 10)
        session.crop(3)
        session.step(7)
    assert generated(replayed) == generated(plain)
    assert replayed.token_ids == plain.token_ids


def test_a_saved_session_goes_on_as_the_replayed_one_would(pair, tmp_path, loaded):
    from kvoffload.runtime.engine import Runtime

    replayed, plain = pair()
    for session in (replayed, plain):
        generated(session, 10)
    replayed.save(tmp_path / "s.kvo")
    with Runtime(loaded, replayed.config).restore(tmp_path / "s.kvo") as restored:
        assert generated(restored) == generated(plain)
    assert generated(replayed) == plain.token_ids[-20:]


def test_logits_that_were_given_out_stay_as_they_are(pair):
    replayed, _ = pair()
    generated(replayed, 5)
    first = replayed.step(3)
    kept = first.clone()
    replayed.step(4)
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "fields",
    [
        {"cuda_graph": "off"},
        {"offload": "nvme", "cpu_max": "1MiB", "prefetch": 0.5},
        {"policy": "retro"},
    ],
    ids=str,
)
def test_where_steps_cannot_be_replayed_they_are_ordinary(pair, fields):
    replayed, plain = pair(**fields)
    assert generated(replayed) == generated(plain)
    assert replayed.stats().graph_steps == 0


@pytest.mark.parametrize(
    "fields",
    [{"selector": "quantized", "completion": "anchored"}, {"selector": "quantized", "completion": "regression"}],
    ids=str,
)
def test_steps_with_an_index_in_host_memory_are_replayed(pair, fields):
    replayed, plain = pair(index="cpu", **fields)
    assert generated(replayed) == generated(plain)
    stats = replayed.stats()
    assert stats.graph_steps > 10
    assert stats.index_host_bytes > 0
    assert stats.index_read_share is None  # nothing crosses a link to a CPU
    layers = replayed.cache.offloaded
    for layer in layers:
        layer.selector.index.streamed = True
    readings = 2 if fields["completion"] == "regression" else 1
    kv = sum(layer.n_tokens * layer.geometry.rows * layer.geometry.token_bytes for layer in layers)
    expected = readings * sum(layer.selector.index_bytes for layer in layers) / kv
    assert replayed.stats().index_read_share == pytest.approx(expected)


def test_reads_of_files_are_between_replays(pair):
    replayed, plain = pair(offload="nvme", budget="10%")
    assert generated(replayed) == generated(plain)
    assert replayed.stats().graph_steps > 10
    assert replayed.stats().decode_bytes_read == plain.stats().decode_bytes_read


def test_a_damaged_page_found_in_a_replay_is_computed_again(pair):
    replayed, plain = pair(offload="nvme", budget="100%", verify=True)
    assert generated(replayed, 6) == generated(plain, 6)
    replayed.cache.stores[0].flush()
    path = replayed.cache.stores[0].directory / "layer-0001.kv"
    damaged = bytearray(path.read_bytes())
    damaged[4096 + 1] ^= 1
    path.write_bytes(damaged)
    assert generated(replayed, 6) == generated(plain, 6)
    assert replayed.stats().recomputed_pages == 1


def test_what_a_failed_replay_leaves_is_not_saved(pair, monkeypatch, tmp_path):
    replayed, _ = pair(offload="nvme", budget="10%")
    generated(replayed, 6)
    fetch = replayed.cache.offloaded[1].fetch

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fetch.store, "read_slices", fail)
    with pytest.raises(OSError, match="Input/output error"):
        replayed.step(3)
    monkeypatch.undo()
    with pytest.raises(KvoffloadError, match="a forward was broken off"):
        replayed.save(tmp_path / "a.kvo")


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_what_a_failed_seal_leaves_is_not_saved(pair, monkeypatch, tmp_path, offload):
    replayed, _ = pair(offload=offload, budget="10%")
    generated(replayed, 6)
    store = replayed.cache.stores[0]
    append = store.append

    def full(layer, pages):
        if layer == 1:
            raise CapacityError("no room")
        return append(layer, pages)

    monkeypatch.setattr(store, "append", full)
    with pytest.raises(OutOfRoomError, match="no room"):
        generated(replayed, 20)
    monkeypatch.undo()
    with pytest.raises(KvoffloadError, match="a forward was broken off"):
        replayed.save(tmp_path / "a.kvo")


def test_another_budget_is_kept_from_the_next_step_on(pair):
    replayed, plain = pair(budget="40")
    for budget in ("40", "8", "24", "10%"):
        for session in (replayed, plain):
            session.set_budget(budget)
        assert generated(replayed, 6) == generated(plain, 6)
    assert replayed.stats().decode_bytes_read == plain.stats().decode_bytes_read
    assert replayed.stats().graph_steps > 10


def test_what_cannot_be_captured_is_run_as_it_is(pair):
    replayed, plain = pair()

    def refuse(call, generators):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    replayed.replays.capture = refuse
    assert generated(replayed) == generated(plain)
    assert replayed.stats().graph_steps == 0
    assert replayed.replays.graph.refusal == "operation not permitted when stream is capturing"


def test_weights_are_joined_where_steps_are_compiled(monkeypatch):
    """Only by a model's first runtime: graphs captured since know their addresses."""
    monkeypatch.setattr("kvoffload.runtime.engine.has_glue", lambda model, compile: compile == "on")
    off, on = (RuntimeConfig(**SMALL, compile=compile) for compile in ("off", "on"))
    eager = RuntimeConfig(**SMALL, compile="on", cuda_graph="off")
    for configs, is_joined in (((on, on), True), ((off, on), False), ((eager,), False), ((), False)):
        loaded = load()
        for config in configs:
            Runtime(loaded, config)
        assert any(True for module in loaded.model.modules() for _ in find_joints(module)) == is_joined


def test_weights_of_several_ranks_are_not_joined(monkeypatch):
    monkeypatch.setattr("kvoffload.runtime.engine.has_glue", lambda model, compile: True)
    loaded = replace(load(), ranks=Ranks(tp_size=2))
    Runtime(loaded, RuntimeConfig(**SMALL, compile="on"))
    assert not any(True for module in loaded.model.modules() for _ in find_joints(module))
