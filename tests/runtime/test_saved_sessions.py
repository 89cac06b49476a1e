"""Sessions that outlive their process: what is saved comes back, and goes on as if nothing had been."""

import os
import shutil
import signal
import stat

import pytest
import torch
from kvoffload_storage.errors import UnavailableError
from tiny import TIERS
from torch.testing import assert_close

from kvoffload.config import SamplingConfig
from kvoffload.errors import UsageError
from kvoffload.runtime import session as session_module


def tokens(session, n, **fields):
    before = len(session.token_ids)
    session.generate(SamplingConfig(max_new_tokens=n, **fields))
    return session.token_ids[before:]


def count_forwards(session, monkeypatch):
    """Tokens of every forward from now on."""
    fed, forward = [], session._forward
    monkeypatch.setattr(session, "_forward", lambda ids: (fed.append(ids.shape[1]), forward(ids))[1])
    feed = session_module.feed
    monkeypatch.setattr(
        session_module, "feed", lambda model, cache, ids: (fed.append(ids.shape[1]), feed(model, cache, ids))[1]
    )
    return fed


@pytest.mark.parametrize("budget", ["10%", "100%"])
@pytest.mark.parametrize("tier", TIERS)
def test_a_restored_session_goes_on_as_if_it_had_never_stopped(runtime, ids, tmp_path, monkeypatch, tier, budget):
    path, rt = tmp_path / "a.kvo", runtime(offload=tier, budget=budget)
    with rt.session() as session:
        session.prefill(ids(150))
        session.generate(SamplingConfig(max_new_tokens=30))
        session.save(path)
        expected = tokens(session, 25)
    with rt.restore(path) as again:
        fed = count_forwards(again, monkeypatch)
        assert tokens(again, 25) == expected
        assert fed == [1] * 25
        stats = again.stats()
    assert (stats.restored_tokens, stats.computed_tokens) == (179, 25)


@pytest.mark.parametrize("source", TIERS)
@pytest.mark.parametrize("target", TIERS)
def test_a_session_moves_between_tiers(runtime, ids, tmp_path, source, target):
    path = tmp_path / "a.kvo"
    with runtime(offload=source, budget="100%").session() as session:
        session.prefill(ids(150))
        session.save(path)
        expected = session.step(3)
    with runtime(offload=target, budget="100%").restore(path) as again:
        assert again.stats().restored_tokens == 150
        assert_close(again.step(3), expected)


def test_a_session_can_be_restored_under_another_policy(runtime, ids, tmp_path):
    path = tmp_path / "a.kvo"
    with runtime().session() as session:
        session.prefill(ids(150))
        session.save(path)
    policy = {"selector": "bounds", "completion": "pages", "gate": True}
    with runtime(**policy).restore(path) as again, runtime(**policy).session() as fresh:
        fresh.prefill(ids(150))
        assert_close(again.step(3), fresh.step(3))


def test_a_gate_keeps_its_choice_and_summaries_their_anchor(runtime, ids, tmp_path):
    path, rt = tmp_path / "a.kvo", runtime(gate=True, reanchor=16, selector="anchored", gate_queries=8)
    with rt.session() as session:
        session.prefill(ids(150))
        session.generate(SamplingConfig(max_new_tokens=60))
        assert session.cache.offloaded[0].anchored is not None
        session.save(path)
        choices = [layer.gate.choice for layer in session.cache.offloaded]
        anchors = [layer.anchored.query for layer in session.cache.offloaded]
        expected = session.step(7)
    with rt.restore(path) as again:
        assert all(torch.equal(x.gate.choice, y) for x, y in zip(again.cache.offloaded, choices, strict=True))
        assert all(torch.equal(x.anchored.query, y) for x, y in zip(again.cache.offloaded, anchors, strict=True))
        assert_close(again.step(7), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("completion", ["regression", "sketch", "anchored"])
def test_a_session_that_was_anchored_anew_is_the_same_when_restored(runtime, ids, tmp_path, completion):
    path, rt = tmp_path / "a.kvo", runtime(reanchor=16, completion=completion, budget="5%")
    with rt.session() as session:
        session.prefill(ids(600))
        session.generate(SamplingConfig(max_new_tokens=45))
        assert session.cache.offloaded[0].anchored is not None
        session.save(path)
        expected = [session.step(7) for _ in range(4)]
    with rt.restore(path) as again:
        for step in expected:
            assert_close(again.step(7), step, atol=1e-3, rtol=1e-3)


def test_sampling_goes_on_where_it_stopped(runtime, ids, tmp_path):
    path, rt = tmp_path / "a.kvo", runtime()
    sampling = SamplingConfig(max_new_tokens=10, temperature=1.5, seed=7)
    with rt.session() as session:
        session.prefill(ids(90))
        session.generate(sampling)
        session.save(path)
        before = len(session.token_ids)
        session.generate()
        expected = session.token_ids[before:]
        session.generate(sampling)
    with rt.restore(path) as again:
        again.generate()
        assert again.token_ids[before:] == expected


def test_saving_again_writes_only_new_pages_and_leaves_no_rubbish(runtime, ids, tmp_path):
    path = tmp_path / "a.kvo"
    with runtime().session() as session:
        session.prefill(ids(150))
        session.save(path)
        inodes = {p.stat().st_ino for p in path.glob("pages-*/*")}
        session.prefill(ids(50, 1))
        session.save(path)
        assert {p.stat().st_ino for p in path.glob("pages-*/*")} == inodes
        expected = session.step(1)
    for _ in range(2):
        with runtime().restore(path) as again:
            assert_close(again.step(1), expected)
    assert len(list(path.iterdir())) == 4
    assert list((tmp_path / "pages").iterdir()) == []


def test_a_session_grows_over_several_processes(runtime, ids, tmp_path):
    path, rt = tmp_path / "a.kvo", runtime(budget="100%")
    with rt.open_session(path) as session:
        session.prefill(ids(60))
    for i in range(1, 4):
        with rt.open_session(path) as session:
            session.prefill(ids(40, i))
    with rt.restore(path) as again, rt.session() as whole:
        whole.prefill(ids(60) + ids(40, 1) + ids(40, 2) + ids(40, 3))
        assert again.token_ids == whole.token_ids
        assert len(list(path.glob("pages-*"))) == 4
        assert_close(again.step(1), whole.step(1), atol=1e-4, rtol=1e-4)


def test_a_session_that_was_gone_on_with_often_is_written_in_one_piece(runtime, ids, tmp_path):
    path, rt = tmp_path / "a.kvo", runtime(budget="100%")
    for i in range(12):
        with rt.open_session(path) as session:
            session.prefill(ids(30, i))
    assert len(list(path.glob("pages-*"))) < 9
    with rt.restore(path) as again, rt.session() as whole:
        whole.prefill([token for i in range(12) for token in ids(30, i)])
        assert_close(again.step(1), whole.step(1), atol=1e-4, rtol=1e-4)


def test_forks_share_their_pages_and_outlive_each_other(runtime, ids, tmp_path):
    a, b, rt = tmp_path / "a.kvo", tmp_path / "b.kvo", runtime(budget="100%")
    with rt.session() as session:
        session.prefill(ids(150))
        session.save(a)
        expected = session.step(1)
    with rt.restore(a) as fork:
        fork.save(b)
    shared = {p.name: p.stat().st_ino for p in a.glob("pages-*/*")}
    assert shared == {p.name: p.stat().st_ino for p in b.glob("pages-*/*")}
    with rt.restore(b) as fork:
        shutil.rmtree(a)
        fork.prefill(ids(60, 2))
        fork.save(b)
        fork.save(a)
    with rt.restore(a) as again, rt.session() as whole:
        whole.prefill(ids(150) + ids(60, 2))
        assert_close(again.step(1), whole.step(1), atol=1e-4, rtol=1e-4)
    del expected


def test_another_session_is_not_replaced_unless_told_so(runtime, ids, tmp_path):
    path, rt = tmp_path / "a.kvo", runtime()
    with rt.session() as first, rt.session() as second:
        first.prefill(ids(50))
        first.save(path)
        second.prefill(ids(60, 1))
        with pytest.raises(UsageError, match="exists already and is not this session"):
            second.save(path)
        first.save(tmp_path / "b.kvo")
        first.save(path)
        second.save(path, overwrite=True)
        with pytest.raises(UsageError, match="was saved by another process since"):
            first.save(path)
    with rt.restore(path) as again:
        assert again.token_ids == ids(60, 1)


def test_a_session_that_began_with_a_part_of_another_does_not_replace_it(runtime, ids, tmp_path):
    path, rt = tmp_path / "a.kvo", runtime()
    with rt.session() as session:
        session.prefill(ids(150))
        session.save(path)
    session, n_tokens = rt.restore_prefix(path, ids(100) + ids(20, 1))
    with session:
        assert n_tokens > 50
        session.prefill((ids(100) + ids(20, 1))[n_tokens:])
        with pytest.raises(UsageError, match="is not this session"):
            session.save(path)


def test_everything_in_a_session_is_private(runtime, ids, tmp_path):
    path = tmp_path / "a.kvo"
    with runtime().session() as session:
        session.prefill(ids(150))
        session.save(path)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in path.rglob("*") if p.is_file()}
    folders = {stat.S_IMODE(p.stat().st_mode) for p in (path, *path.rglob("*")) if p.is_dir()}
    assert (modes, folders) == ({0o600}, {0o700})


def test_a_session_that_was_opened_to_others_is_private_again_when_it_is_written_to(
    runtime, ids, tmp_path, monkeypatch, caplog
):
    path, rt = tmp_path / "a.kvo", runtime()
    with rt.open_session(path) as session:
        session.prefill(ids(60))
    notes = path / "notes.txt"
    notes.touch()
    everything = [path, *path.rglob("*")]
    for each in everything:
        each.chmod(0o755)
    with rt.restore(path):
        assert {stat.S_IMODE(each.stat().st_mode) for each in everything} == {0o755}
    with monkeypatch.context() as patched:
        uid = os.getuid()
        patched.setattr(os, "getuid", lambda: uid + 1)
        with rt.open_session(path):
            assert {stat.S_IMODE(each.stat().st_mode) for each in everything} == {0o755}
        assert caplog.messages == [f"{path}: others may use it, and its mode cannot be changed by you"]
    with rt.open_session(path):
        modes = {each: stat.S_IMODE(each.stat().st_mode) for each in everything}
    assert modes.pop(notes) == 0o755
    assert modes == {each: 0o700 if each.is_dir() else 0o600 for each in modes}
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"page_size": 8}, "page_size 4 .here 8."),
        ({"sinks": 2}, "sinks 4 .here 2."),
        ({"recent": 16}, "recent 8 .here 16."),
    ],
)
def test_what_changes_bytes_is_refused_by_name(runtime, ids, tmp_path, fields, message):
    path = tmp_path / "a.kvo"
    with runtime().session() as session:
        session.prefill(ids(50))
        session.save(path)
    with pytest.raises(UsageError, match=message):
        runtime(**fields).restore(path)


def test_another_models_session_is_refused(runtime, ids, tmp_path, monkeypatch):
    path = tmp_path / "a.kvo"
    with runtime().session() as session:
        session.prefill(ids(50))
        session.save(path)
    monkeypatch.setattr("kvoffload.runtime.saving.weights_hash", lambda source: "0" * 32)
    with pytest.raises(UsageError, match="was made with other weights"):
        runtime().restore(path)


def test_one_writer_at_a_time_and_readers_beside_it(runtime, ids, tmp_path):
    path, rt = tmp_path / "a.kvo", runtime()
    with rt.open_session(path) as writer:
        writer.prefill(ids(50))
        with pytest.raises(UsageError, match="another process is writing"):
            rt.open_session(path)
        with rt.restore(path) as reader, rt.restore(path) as second:
            writer.prefill(ids(50, 1))
            assert reader.stats().restored_tokens == second.stats().restored_tokens == 50
            assert_close(reader.step(1), second.step(1))
            with pytest.raises(UsageError, match="another process is writing"):
                reader.save(path)
    with rt.restore(path) as first, rt.restore(path) as second:
        first.step(1)
        first.save(path)
        second.step(2)
        with pytest.raises(UsageError, match="was saved by another process since"):
            second.save(path)


def test_one_maker_at_a_time_who_is_told_before_the_prefill(runtime, ids, tmp_path):
    path, rt = tmp_path / "a.kvo", runtime()
    with rt.open_session(path) as first:
        with pytest.raises(UsageError, match="another process is making this session"):
            rt.open_session(path)
        with rt.open_session(tmp_path / "b.kvo"):
            pass
        first.prefill(ids(20))
        assert {p.name for p in tmp_path.iterdir()} == {"a.kvo", "pages"}
        with pytest.raises(UsageError, match="another process is writing"):
            rt.open_session(path)
    with rt.open_session(tmp_path / "c.kvo"):
        assert len(list(tmp_path.iterdir())) == 3
    assert {p.name for p in tmp_path.iterdir()} == {"a.kvo", "pages"}


def test_a_killed_maker_leaves_the_name_free(runtime, tmp_path):
    path, rt = tmp_path / "a.kvo", runtime()
    child = os.fork()
    if child == 0:
        made = rt.open_session(path)
        os.kill(os.getpid(), signal.SIGKILL)
        made.close()
    os.waitpid(child, 0)
    with rt.open_session(path) as session:
        session.prefill([1, 2, 3])
    assert {p.name for p in tmp_path.iterdir()} == {"a.kvo", "pages"}


def test_a_broken_off_prefill_goes_on_from_the_last_chunk(runtime, ids, tmp_path, monkeypatch):
    path, rt = tmp_path / "a.kvo", runtime(prefill_chunk=20, budget="100%")

    class Killed(BaseException):
        pass

    def die(progress):
        if progress.done_tokens >= 80:
            raise Killed

    session = rt.open_session(path)
    with pytest.raises(Killed):
        session.prefill(ids(150), die)
    session.close()
    with rt.open_session(path) as again, rt.session() as whole:
        assert again.unfinished
        fed = count_forwards(again, monkeypatch)
        again.finish_prefill()
        whole.prefill(ids(150))
        assert (sum(fed), again.stats().restored_tokens) == (74, 76)
        assert again.token_ids == whole.token_ids
        assert_close(again.step(1), whole.step(1), atol=1e-4, rtol=1e-4)


def test_a_missing_session_is_named(runtime, tmp_path):
    with pytest.raises(UsageError, match="there is no such session"):
        runtime().restore(tmp_path / "none.kvo")
    (tmp_path / "file.kvo").write_text("text")
    with pytest.raises(UsageError, match="not a session"):
        runtime().restore(tmp_path / "file.kvo")


def test_a_batch_and_a_broken_off_forward_cannot_be_saved(runtime, ids, tmp_path, monkeypatch):
    with runtime().session() as session:
        session.prefill(ids(50))
        session.cache.offloaded[1].anchors.n_tokens += 1
        with pytest.raises(Exception, match="a forward was broken off"):
            session.save(tmp_path / "a.kvo")
    assert not os.path.exists(tmp_path / "a.kvo")


def test_a_closed_session_writes_nothing(runtime, ids, tmp_path):
    """Its files' descriptors are others' by then."""
    session = runtime().session()
    session.prefill(ids(150))
    session.close()
    theirs = [(tmp_path / f"{i}").open("w+b") for i in range(12)]
    for file in theirs:
        file.write(bytes(1 << 20))
        file.flush()
    for use in (
        lambda: session.save(tmp_path / "a.kvo"),
        lambda: session.prefill(ids(5)),
        lambda: session.step(1),
        lambda: session.generate(SamplingConfig(max_new_tokens=1)),
    ):
        with pytest.raises(UsageError, match="this session is closed"):
            use()
    with pytest.raises(UnavailableError, match="the store is closed"):
        session.cache.stores[0].seal()
    assert {os.fstat(file.fileno()).st_size for file in theirs} == {1 << 20}
    assert not (tmp_path / "a.kvo").exists()
    for file in theirs:
        file.close()


def test_no_session_is_made_inside_another(runtime, ids, tmp_path):
    with runtime().session() as session:
        session.prefill(ids(60))
        session.save(tmp_path / "a.kvo")
        with pytest.raises(UsageError, match="another one cannot be in it"):
            session.save(tmp_path / "a.kvo" / "b.kvo")
