"""Three tiers in one request: the tokens are those of one tier, bytes are counted, late pages are completed."""

import pytest
import torch
from kvoffload_storage import LatencyStore, TracingStore
from torch.testing import assert_close

from kvoffload.config import SamplingConfig
from kvoffload.errors import UsageError
from kvoffload.runtime.engine import Runtime

TIERS = {
    "cpu tier": {"cpu_max": "20KiB"},
    "tiny cpu tier": {"cpu_max": "1KiB"},
    "prefetch": {"cpu_max": "20KiB", "prefetch": 0.5},
    "page cache": {"cpu_max": "20KiB", "prefetch": 0.5, "gpu_cache": "30KiB"},
    "deadline in time": {"cpu_max": "20KiB", "fetch": "deadline", "fetch_ms": 1000},
}


def steps(session, ids):
    session.prefill(ids(150))
    session.cache.stores[0].flush()
    return torch.stack([session.step(token) for token in ids(40, 1)])


@pytest.mark.parametrize("budget", ["60%", "100%"])
@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS)
def test_tiers_change_where_bytes_are_and_nothing_else(open_session, ids, tiers, budget):
    one, three = open_session(offload="nvme", budget=budget), open_session(offload="nvme", budget=budget, **tiers)
    assert_close(steps(three, ids), steps(one, ids))


@pytest.mark.parametrize("tiers", TIERS.values(), ids=TIERS)
def test_every_byte_that_moves_is_counted(open_session, ids, tiers):
    """What the files under the tier really gave is what the statistics say came from them."""
    traced = []

    def trace(store):
        store.inner = TracingStore(store.inner)
        traced.append(store.inner)
        return store

    session = open_session(offload="nvme", budget="60%", wrap=trace, **tiers)
    steps(session, ids)
    session.cache.stores[0].flush()
    for flight in session.cache.stores[0]._flights:
        flight.ticket.done(None)
    assert session.stats().bytes_read["nvme"] == traced[0].read.nvme


def test_a_cpu_tier_takes_reads_off_the_disk(open_session, ids):
    alone, before = (open_session(offload="nvme", budget="60%", cpu_max=size) for size in (None, "1MiB"))
    for session in (alone, before):
        steps(session, ids)
    disk = [session.stats().decode_bytes_read["nvme"] for session in (alone, before)]
    assert disk[1] < disk[0] / 4


def slow(seconds):
    def wrap(store):
        store.inner = LatencyStore(store.inner, seconds)
        return store

    return wrap


@pytest.mark.parametrize("completion", ["anchored", "none"])
def test_late_pages_are_left_to_the_completion(open_session, ids, completion):
    session = open_session(
        offload="nvme",
        budget="60%",
        cpu_max="4KiB",
        fetch="deadline",
        fetch_ms=0,
        completion=completion,
        wrap=slow(0.05),
    )
    session.prefill(ids(150))
    session.cache.stores[0].flush()
    logits = torch.stack([session.step(token) for token in ids(10, 1)])
    assert torch.isfinite(logits).all()
    stats = session.stats()
    assert stats.late_share > 0.2
    assert stats.disk_wait_ms < 50


def test_a_full_budget_waits_whatever_the_deadline_says(open_session, ids):
    late = open_session(offload="nvme", budget="100%", cpu_max="4KiB", fetch="deadline", fetch_ms=0, wrap=slow(0.002))
    one = open_session(offload="nvme", budget="100%")
    for session in (late, one):
        session.prefill(ids(100))
    for token in ids(3, 1):
        assert_close(late.step(token), one.step(token))
    assert late.stats().late_share == 0


def test_the_time_that_steps_wait_for_files_is_told(open_session, ids):
    session = open_session(offload="nvme", budget="60%", cpu_max="1KiB", wrap=slow(0.01))
    session.prefill(ids(100))
    session.cache.stores[0].flush()
    session.generate(SamplingConfig(max_new_tokens=4))
    assert session.stats().disk_wait_ms >= 4 * 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"offload": "nvme", "fetch": "deadline"}, "fetch: 'deadline' needs a tier"),
        ({"offload": "cpu", "cpu_max": "1MiB", "fetch": "deadline"}, "fetch: 'deadline' needs a tier"),
        ({"offload": "nvme", "cpu_max": "1MiB", "gpu_cache": "1MiB", "fetch": "deadline"}, "and no --gpu-cache"),
        ({"offload": "nvme", "prefetch": 0.5}, "prefetch: 0.5 has nowhere to put pages"),
        ({"offload": "nvme", "cpu_max": "1MiB", "prefetch": -1}, "prefetch: -1"),
        ({"fetch": "sometimes"}, "accepted: wait, deadline"),
    ],
)
def test_what_cannot_work_together_is_told(fields, message):
    with pytest.raises(UsageError, match=message):
        Runtime.from_pretrained("tiny", **fields)
