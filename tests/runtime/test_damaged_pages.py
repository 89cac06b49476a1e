"""Pages of a session that the disk gives back otherwise than they were written."""

import os
import shutil

import pytest
from kvoffload_storage.bundle import open_bundle
from kvoffload_storage.errors import IntegrityError
from kvoffload_storage.manifests import read_manifest
from kvoffload_storage.rewrite import MOST_SEGMENTS
from tiny import TIERS
from torch.testing import assert_close

from kvoffload.config import SamplingConfig


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("damage", [[(2, 4096 + 5)], [(0, 4096 * 20 + 9), (3, 4096 * 12), (3, 4096 * 13)]])
def test_damaged_pages_are_computed_again_at_the_restore(runtime, ids, tmp_path, damage, tier):
    path, rt = tmp_path / "a.kvo", runtime(offload=tier, budget="100%")
    with rt.session() as session:
        session.prefill(ids(150))
        session.generate(SamplingConfig(max_new_tokens=5))
        session.save(path)
        expected = session.step(3)
        kept = session.token_ids
    for layer, at in damage:
        flip(next(path.glob(f"pages-*/layer-{layer:04d}.kv")), at)
    with rt.open_session(path) as again:
        assert_close(again.step(3), expected, atol=1e-4, rtol=1e-4)
        assert again.token_ids == kept
        stats = again.stats()
        assert stats.recomputed_pages == len(damage)
        assert stats.restored_tokens + stats.computed_tokens >= 155
        again.save(path)
    with rt.restore(path) as mended:
        assert mended.stats().recomputed_pages == 0
        assert_close(mended.step(4), again_after(rt, kept, 4), atol=1e-4, rtol=1e-4)


def again_after(rt, token_ids, token):
    with rt.session() as fresh:
        fresh.prefill(token_ids)
        return fresh.step(token)


def test_a_page_damaged_in_use_never_reaches_an_answer(runtime, ids):
    rt = runtime(budget="100%", verify=True)
    with rt.session() as session, rt.session() as whole:
        for each in (session, whole):
            each.prefill(ids(150))
        session.cache.stores[0].flush()
        flip(session.cache.stores[0].directory / "layer-0001.kv", 4096 * 9 + 77)
        before = session.stats().decode_bytes_read["nvme"]
        for token in ids(4, 1):
            assert_close(session.step(token), whole.step(token), atol=1e-4, rtol=1e-4)
        stats = session.stats()
        assert stats.recomputed_pages == 1
        assert stats.decode_bytes_read["nvme"] > before


def test_a_page_damaged_while_a_prompt_comes_in_is_computed_again(runtime, ids):
    rt = runtime(budget="100%", prefill_chunk=50)
    with rt.session() as session:
        session.prefill(ids(100))
        session.cache.stores[0].flush()
        flip(session.cache.stores[0].directory / "layer-0003.kv", 4096 * 4 + 100)
        session.prefill(ids(90, 1))
        assert session.stats().recomputed_pages == 1
        assert_close(session.step(3), again_after(rt, ids(100) + ids(90, 1), 3), atol=1e-4, rtol=1e-4)


def test_a_disk_that_keeps_damaging_pages_is_given_up(runtime, ids):
    with runtime(budget="100%", verify=True).session() as session:
        session.prefill(ids(100))

        def damaged_step(token):
            session.cache.stores[0].flush()
            flip(session.cache.stores[0].directory / "layer-0001.kv", 4096 + 1)
            session.step(token)

        for token in ids(3, 1):
            damaged_step(token)
        with pytest.raises(IntegrityError, match="checksum"):
            damaged_step(5)
        assert session.stats().recomputed_pages == 3


@pytest.fixture
def two_segments(runtime, ids, tmp_path):
    """A saved session of two segments of 100 and 80 tokens, and the logits that follow token 3."""
    path = tmp_path / "a.kvo"
    for seed, n_tokens in enumerate((100, 80)):
        with runtime().open_session(path) as session:
            session.prefill(ids(n_tokens, seed))
    with runtime(budget="100%").restore(path) as session:
        return path, session.step(3)


def remove(file):
    file.unlink()


def replace_by_a_link(file):
    file.rename(file.with_suffix(".away"))
    file.symlink_to(file.with_suffix(".away"))


def remove_folder(file):
    shutil.rmtree(file.parent)


def cut_to(n_bytes):
    return lambda file: os.truncate(file, n_bytes)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    ("segment", "lose", "n_kept"),
    [
        (0, remove, 0),
        (0, remove_folder, 0),
        (0, replace_by_a_link, 0),
        (0, cut_to(100), 0),
        (0, cut_to(4096 * 11 + 50), 10),
        (1, remove, 22),
        (1, remove_folder, 22),
        (1, cut_to(4096 * 4), 25),
    ],
)
def test_lost_pages_are_computed_again_at_the_restore(runtime, two_segments, tier, segment, lose, n_kept):
    path, expected = two_segments
    rt = runtime(offload=tier, budget="100%")
    folder = path / read_manifest(path).stores[0].segments[segment].folder
    lose(folder / "layer-0002.kv")
    before = contents(path)
    with pytest.raises(IntegrityError):
        open_bundle(path)
    with rt.restore(path) as reader:
        stats = reader.stats()
        assert stats.restored_tokens == 4 + 4 * n_kept
        assert stats.restored_tokens + stats.computed_tokens == len(reader.token_ids) == 180
        assert stats.recomputed_pages > 0
        assert_close(reader.step(3), expected, atol=1e-4, rtol=1e-4)
    assert contents(path) == before
    with rt.open_session(path) as again:
        again.save(path)
    open_bundle(path).close()
    with rt.restore(path) as mended:
        assert mended.stats().recomputed_pages == 0
        assert_close(mended.step(3), expected, atol=1e-4, rtol=1e-4)


def contents(path):
    return {p: (p.lstat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in path.rglob("*")}


def test_pages_that_are_gone_while_a_session_runs_are_computed_again(runtime, ids):
    rt = runtime(budget="100%")
    with rt.session() as session, rt.session() as whole:
        for each in (session, whole):
            each.prefill(ids(150))
        session.cache.stores[0].flush()
        os.truncate(session.cache.stores[0].directory / "layer-0001.kv", 4096 * 9 + 77)
        for token in ids(4, 1):
            assert_close(session.step(token), whole.step(token), atol=1e-4, rtol=1e-4)
        assert session.stats().recomputed_pages > 0


def test_a_scattered_session_is_mended_before_it_is_written_in_one_piece(runtime, ids, tmp_path):
    path, rt = tmp_path / "a.kvo", runtime(budget="100%")
    for i in range(MOST_SEGMENTS + 1):
        with rt.open_session(path) as session:
            session.prefill(ids(20, i))
    next(path.glob("pages-*/layer-0001.kv")).unlink()
    with rt.open_session(path) as session:
        assert session.stats().recomputed_pages > 0
        assert_close(session.step(3), again_after(rt, session.token_ids[:-1], 3), atol=1e-4, rtol=1e-4)
