"""Sessions and the room that there is for them: what finds none leaves everything as it was."""

import errno
import os

import pytest
from kvoffload_storage.errors import CapacityError
from kvoffload_storage.manifests import read_manifest
from tiny import TIERS
from torch.testing import assert_close

from kvoffload.config import SamplingConfig
from kvoffload.errors import OutOfRoomError


@pytest.mark.parametrize("tier", TIERS)
def test_a_prompt_that_finds_no_room_leaves_the_session_as_it_was(runtime, ids, tmp_path, tier):
    path = tmp_path / "pages" / "a.kvo"
    path.parent.mkdir()
    bounded = {"offload": tier, "budget": "100%", "prefill_chunk": 40}
    rt = runtime(**bounded, nvme_max=2 << 20)
    with rt.open_session(path) as session:
        session.prefill(ids(60))
        session.generate(SamplingConfig(max_new_tokens=5))
        session.save(path)
        before, saved = list(session.token_ids), read_manifest(path)
        with pytest.raises((CapacityError, OutOfRoomError), match="the cap is 2,097,152"):
            session.prefill(ids(900, 1))
        assert (session.token_ids, session.unfinished) == (before, False)
        assert read_manifest(path) == saved
        assert {p.name for p in path.iterdir()} == saved.files | {"manifest.json"}
        expected = session.step(3)
        session.prefill(ids(20, 2))
    with runtime(**bounded).open_session(path) as again, rt.session() as whole:
        whole.prefill(before)
        assert_close(whole.step(3), expected, atol=1e-4, rtol=1e-4)
        whole.prefill(ids(20, 2))
        assert again.token_ids == whole.token_ids
        assert_close(again.step(4), whole.step(4), atol=1e-4, rtol=1e-4)


def test_a_session_of_pages_in_files_alone_goes_back_too(runtime, ids):
    with runtime(budget="100%", nvme_max=1 << 20).session() as session, runtime(budget="100%").session() as whole:
        for each in (session, whole):
            each.prefill(ids(60))
        with pytest.raises(OutOfRoomError, match="the cap is"):
            session.prefill(ids(900, 1))
        assert session.token_ids == ids(60)
        for each in (session, whole):
            each.prefill(ids(20, 2))
        assert_close(session.step(3), whole.step(3), atol=1e-4, rtol=1e-4)


def test_no_save_or_rewrite_breaks_the_cap(runtime, ids, tmp_path):
    path, cap = tmp_path / "pages" / "a.kvo", 3 << 19
    path.parent.mkdir()
    rt, told = runtime(budget="100%", nvme_max=cap), []
    for i in range(12):
        try:
            with rt.open_session(path) as session:
                session.prefill(ids(60, i))
                told.append(len(session.token_ids))
        except (CapacityError, OutOfRoomError):
            break
        assert taken(path.parent) <= cap
    assert 1 < len(told) < 12
    assert taken(path.parent) <= cap
    with runtime(budget="100%").restore(path) as again:
        assert len(again.token_ids) == told[-1]


def test_a_save_that_finds_no_room_leaves_what_was_saved(runtime, ids, tmp_path):
    path = tmp_path / "pages" / "a.kvo"
    with runtime().session() as session:
        session.prefill(ids(60))
        session.save(path)
        before, saved = set(path.rglob("*")), read_manifest(path)
        session.step(1)
        session.config = session.config.model_copy(update={"nvme_max": taken(path.parent)})
        with pytest.raises(CapacityError, match="the cap is"):
            session.save(path)
        assert (set(path.rglob("*")), read_manifest(path)) == (before, saved)
        session.config = session.config.model_copy(update={"nvme_max": None})
        session.save(path)


def taken(folder):
    """Bytes on the disk of all files below, each counted once."""
    states = [p.lstat() for p in folder.rglob("*") if p.is_file()]
    return sum(n_blocks * 512 for _, n_blocks in {(state.st_ino, state.st_blocks) for state in states})


def test_copies_to_another_file_system_are_written_once(runtime, ids, tmp_path, monkeypatch):
    path, rt, sent = tmp_path / "a.kvo", runtime(prefill_chunk=30, budget="100%"), []

    def refuse(*_, **__):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    sendfile = os.sendfile
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "sendfile", lambda *args: (n := sendfile(*args), sent.append(n))[0])
    with rt.open_session(path) as session:
        session.prefill(ids(300))
        expected = session.step(1)
    assert sum(sent) == sum(p.stat().st_size for p in path.glob("pages-*/*"))
    assert len(list(path.iterdir())) == 4
    with rt.restore(path) as again:
        assert_close(again.step(1), expected, atol=1e-4, rtol=1e-4)
        assert again.stats().recomputed_pages == 0


def test_what_a_killed_process_allocated_is_given_back(runtime, ids, tmp_path):
    path, rt = tmp_path / "pages" / "a.kvo", runtime(budget="100%", prefill_chunk=40)
    with rt.open_session(path) as session:
        session.prefill(ids(150))
        session.prefill(ids(45, 1))
        sizes = {p: p.stat().st_size for p in path.rglob("*")}
    rubbish = path / "state-0123456789abcdef.safetensors"
    rubbish.write_bytes(b"x")
    for file in path.glob("pages-*/*"):
        os.truncate(file, 2 * sizes[file])
    with rt.open_session(path) as session:
        assert {p: p.stat().st_size for p in path.rglob("*")} == sizes
        assert session.token_ids == ids(150) + ids(45, 1)


def test_what_a_fork_or_a_living_store_needs_is_not_given_back(runtime, ids, tmp_path):
    path, rt = tmp_path / "pages" / "a.kvo", runtime(budget="100%")
    with rt.session() as alive:
        alive.prefill(ids(150))
        alive.save(path)
        alive.prefill(ids(100, 1))
        alive.cache.stores[0].flush()
        expected = alive.step(1)
        with rt.open_session(path):
            pass
        alive.crop(1)
        assert_close(alive.step(1), expected, atol=1e-4, rtol=1e-4)
