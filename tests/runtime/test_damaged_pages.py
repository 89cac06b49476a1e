"""Pages of a session that the disk gives back otherwise than they were written."""

import pytest
from kvoffload_storage.errors import IntegrityError
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
