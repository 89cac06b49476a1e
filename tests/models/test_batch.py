"""One forward for several sequences: what each of them gets is what it gets alone, whoever comes, goes or fails."""

from contextlib import ExitStack

import pytest
import torch
from families import FAMILIES, family_model
from kvoffload_storage import FaultyStore
from kvoffload_storage.errors import StorageError
from kvoffload_storage.wrappers import Fault

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.models.batch import can_batch
from kvoffload.models.catalog import LoadedModel
from kvoffload.models.shapes import byte_tokenizer
from kvoffload.runtime.engine import Runtime

SMALL = {"sinks": 4, "recent": 8, "page_size": 4}
BOUNDED = {"gemma2", "gemma3_text", "gpt_oss"}  # they have sliding windows
LENGTHS, BUDGETS, NEW = (90, 21, 60, 5), ("10%", "32", "100%", "25%"), (9, 14, 3, 6)


def runtime(family, **fields):
    model = family_model(family)
    return Runtime(LoadedModel(model, byte_tokenizer(), family, model.config), RuntimeConfig(**(SMALL | fields)))


def prompt(n, seed):
    return torch.randint(2, 90, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def prefilled(rt, stack, i):
    session = stack.enter_context(rt.session(budget=BUDGETS[i]))
    session.prefill(prompt(LENGTHS[i], i))
    return session


def alone(rt):
    """The new tokens of each of the four sequences."""
    found = []
    with ExitStack() as stack:
        for i, n in enumerate(NEW):
            session = prefilled(rt, stack, i)
            found.append([event.token for event in session.stream(SamplingConfig(max_new_tokens=n))])
    return found


def coming_and_going(rt):
    """The same, the third joining after two steps of the others and the fourth after five; who is done leaves."""
    tokens, going, step = [[] for _ in NEW], {}, 0
    with ExitStack() as stack:
        while going or step == 0:
            for i in {0: (0, 1), 2: (2,), 5: (3,)}.get(step, ()):
                session = prefilled(rt, stack, i)
                going[i] = session, session.stream(SamplingConfig(max_new_tokens=NEW[i]))
            rt.feed_ahead([session for session, _ in going.values()])
            for i, (_, stream) in list(going.items()):
                event = next(stream)
                tokens[i].append(event.token)
                if event.finish:
                    del going[i]
            step += 1
    return tokens


def together(rt, sessions, n):
    """The tokens of each, and the error that was raised at the end."""
    got = {id(session): [] for session in sessions}
    error = None
    try:
        for session, event in rt.stream_together(sessions, SamplingConfig(max_new_tokens=n)):
            got[id(session)].append(event.token)
    except StorageError as raised:
        error = raised
    return [got[id(session)] for session in sessions], error


@pytest.mark.parametrize("family", FAMILIES)
def test_who_comes_and_goes_gets_what_each_gets_alone(family):
    rt = runtime(family)
    assert rt.shares_forwards == (family not in BOUNDED)
    assert coming_and_going(rt) == alone(rt)


@pytest.mark.parametrize(
    "fields",
    [{"offload": "nvme"}, {"offload": "nvme", "cpu_max": 1 << 20, "prefetch": 0.5}, {"gpu_cache": 1 << 16},
     {"selector": "bounds", "completion": "anchored", "reanchor": 16}, {"policy": "prhs"}, {"policy": "hshare"},
     {"policy": "retro:window=2"}, {"max_dropped_mass": 0.05}, {"look_ahead": True}],
    ids=lambda fields: "+".join(fields),
)  # fmt: skip
def test_every_way_to_read_gives_the_same_together(fields, tmp_path):
    rt = runtime("llama", nvme_dir=tmp_path, nvme_floor=0, **fields)
    assert rt.shares_forwards == (fields.get("policy") != "retro:window=2")
    assert coming_and_going(rt) == alone(rt)


def test_a_step_of_four_is_one_forward_and_each_is_charged_for_its_own(monkeypatch):
    rt = runtime("llama")
    with ExitStack() as stack:
        sessions = [prefilled(rt, stack, i) for i in range(4)]
        assert rt.shares_forwards
        batches, forward = [], rt.loaded.model.forward

        def counted(*args, **kwargs):
            batches.append(args[0].shape[0])
            return forward(*args, **kwargs)

        monkeypatch.setattr(rt.loaded.model, "forward", counted)
        events = list(rt.stream_together(sessions, SamplingConfig(max_new_tokens=5)))
        assert batches == [4] * 4
        assert len(events) == 20
        together = [session.stats() for session in sessions]
        monkeypatch.undo()
        own = [prefilled(rt, stack, i) for i in range(4)]
        for session in own:
            session.generate(SamplingConfig(max_new_tokens=5))
        for mine, theirs in zip(together, (session.stats() for session in own), strict=True):
            assert mine.decode_bytes_read == theirs.decode_bytes_read
            assert mine.charged_tokens_per_step == theirs.charged_tokens_per_step
            assert (mine.new_tokens, mine.computed_tokens) == (theirs.new_tokens, theirs.computed_tokens)


def test_who_fails_fails_alone(tmp_path):
    rt = runtime("llama", offload="nvme", nvme_dir=tmp_path, nvme_floor=0)
    expected = alone(rt)
    with ExitStack() as stack:
        sessions = [prefilled(rt, stack, i) for i in range(4)]
        cache = sessions[0].cache
        for shape, store in cache._stores.items():
            cache._stores[shape] = FaultyStore(store, [Fault("read_slices", 7, StorageError("the disk is gone"))])
            for layer in cache.offloaded:
                layer.store = layer.fetch.store = cache._stores[shape]
        tokens, error = together(rt, sessions, 9)
    assert str(error) == "the disk is gone"
    assert tokens[0] == expected[0][: len(tokens[0])]
    assert 0 < len(tokens[0]) < 9
    for i in (1, 2, 3):
        n = min(9, NEW[i])
        assert tokens[i][:n] == expected[i][:n]
        assert len(tokens[i]) == 9


def test_a_page_damaged_in_a_shared_forward_is_computed_again(tmp_path):
    rt = runtime("llama", offload="nvme", nvme_dir=tmp_path, nvme_floor=0, verify=True, budget="100%")
    with ExitStack() as stack:
        sessions, whole = ([stack.enter_context(rt.session()) for _ in range(2)] for _ in "ab")
        for group in (sessions, whole):
            for i, session in enumerate(group):
                session.prefill(prompt(90 + i, i))
        sessions[0].cache.stores[0].flush()
        path = sessions[0].cache.stores[0].directory / "layer-0001.kv"
        data = bytearray(path.read_bytes())
        data[4096 * 3 + 9] ^= 1
        path.write_bytes(data)
        expected = [[e.token for e in session.stream(SamplingConfig(max_new_tokens=6))] for session in whole]
        assert together(rt, sessions, 6) == (expected, None)
        assert [session.stats().recomputed_pages for session in sessions] == [1, 0]


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                                  {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
                                   "original_max_position_embeddings": 64, "rope_theta": 1e4}])  # fmt: skip
def test_rotations_that_follow_the_longest_sequence_share_no_forward(rope):
    model = family_model("llama")
    assert can_batch(model, RuntimeConfig(**SMALL))
    model.config.rope_parameters = rope
    assert not can_batch(model, RuntimeConfig(**SMALL))


def test_a_model_that_gives_other_logits_in_a_batch_shares_no_forward(monkeypatch):
    rt = runtime("llama")
    rotary = rt.loaded.model.model.rotary_emb
    forward = rotary.forward
    monkeypatch.setattr(
        rotary, "forward", lambda x, position_ids: forward(x, position_ids.max().expand(*position_ids.shape) + 0)
    )
    assert not rt.shares_forwards
