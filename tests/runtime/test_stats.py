"""What a session says it moved, against a store that counts and against arithmetic done by hand."""

import pytest
from kvoffload_storage import Moved, TracingStore, WrapperStore

from kvoffload.completion import keepkv
from kvoffload.completion.anchored import AnchoredCompletion
from kvoffload.config import VARIANTS, SamplingConfig
from kvoffload.runtime.stats import Reads
from kvoffload.runtime.terminal import statistics_line

# tiny: 4 layers, 2 kv heads, head size 16 in fp32: a token-equivalent is 2 * 16 * 4 = 128 bytes
N_LAYERS, N_HEADS, TOKEN_BYTES = 4, 2, 128


class Hidden(WrapperStore):
    """Not addressable, so that every read is seen by a tracing store."""

    def mapped(self, layer):
        return None


class Traced:
    """Keeps hold of the tracing store that a session opens."""

    def __init__(self):
        self.store = None

    def __call__(self, store):
        self.store = TracingStore(Hidden(store))
        return self.store


def run(session, prompt, n_steps):
    """A prefill and ``n_steps`` decode steps."""
    session.prefill(prompt)
    session.generate(SamplingConfig(max_new_tokens=n_steps + 1))
    return session.stats()


def total(by_tier):
    return by_tier["cpu"] + by_tier["nvme"]


@pytest.mark.parametrize("gpu_cache", ["off", "64KiB"])
@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_reads_are_what_the_store_moved(open_session, ids, offload, gpu_cache):
    traced, n_steps = Traced(), 9
    session = open_session(offload=offload, gpu_cache=gpu_cache, page_size=32, budget="40%", wrap=traced)
    session.prefill(ids(300))
    assert session.stats().bytes_read == {"cpu": traced.store.read.cpu, "nvme": traced.store.read.nvme}
    traced.store.reset()
    session.generate(SamplingConfig(max_new_tokens=n_steps + 1))
    stats = session.stats()
    assert stats.decode_bytes_read == {"cpu": traced.store.read.cpu, "nvme": traced.store.read.nvme}
    moved = traced.store.read.cpu + traced.store.read.nvme
    assert moved > 0
    assert stats.read_tokens_per_step == pytest.approx(moved / (n_steps * N_LAYERS * N_HEADS * TOKEN_BYTES))
    context = 300 + (1 + n_steps) / 2  # step i of n sees 300 + i tokens
    assert stats.read_share == pytest.approx(stats.read_tokens_per_step / context)


@pytest.mark.parametrize("pool", ["layer", "none"])
@pytest.mark.parametrize("budget", ["3%", "10%", "50%"])
@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_reads_stay_within_the_budget(open_session, ids, offload, budget, pool):
    stats = run(open_session(offload=offload, budget=budget, page_size=32, pool=pool), ids(400), 5)
    assert stats.read_share <= float(budget.rstrip("%")) / 100
    assert stats.charged_tokens_per_step >= stats.read_tokens_per_step


def test_a_budget_is_used_up_to_less_than_a_slice(open_session, ids):
    stats = run(open_session(budget="10%"), ids(400), 5)
    assert 0.1 * 403 - 4 / N_HEADS < stats.read_tokens_per_step <= 0.1 * 403
    assert stats.budget_tokens == pytest.approx(40.5)


@pytest.mark.parametrize("selector", [kind for kind in VARIANTS["selector"] if kind != "exact"])
def test_without_completion_nothing_more_is_charged(open_session, ids, selector):
    stats = run(open_session(selector=selector, completion="none"), ids(200), 4)
    assert stats.charged_tokens_per_step == stats.read_tokens_per_step
    assert stats.completion_mass == 0.0


def test_a_summary_is_charged_in_every_step(open_session, ids):
    """Anchored: 32 segments of 16 + 16 + 2 numbers in fp32 a head, 34 token-equivalents."""
    stats = run(open_session(completion="anchored"), ids(200), 4)
    assert stats.charged_tokens_per_step - stats.read_tokens_per_step == pytest.approx(32 * 34 * 4 / TOKEN_BYTES)
    assert stats.charged_share == pytest.approx(stats.charged_tokens_per_step / 202.5)
    assert 0 < stats.completion_mass < 1


@pytest.mark.parametrize(
    "fields", [{"policy": "retro:window=4"}, {"max_dropped_mass": 0.01}, {"look_ahead": False}], ids=str
)
def test_a_summary_is_charged_as_often_as_it_is_read(open_session, ids, monkeypatch, fields):
    """Anchored, as above: more than one estimate a step touches it more than once."""
    estimates, estimate = [], AnchoredCompletion.estimate

    def counted(self, *args):
        estimates.append(self)
        return estimate(self, *args)

    monkeypatch.setattr(AnchoredCompletion, "estimate", counted)
    n_steps = 4
    stats = run(open_session(completion="anchored", budget="5%", **fields), ids(200), n_steps)
    each = len(estimates) / (n_steps * N_LAYERS)
    assert each == 1 if "look_ahead" in fields else each > 1
    charged = stats.charged_tokens_per_step - stats.read_tokens_per_step
    assert charged == pytest.approx(each * 32 * 34 * 4 / TOKEN_BYTES)


def test_the_token_oracle_is_charged_for_the_keys_it_reads(open_session, ids):
    """Half of every sealed token's bytes, and the selected pages themselves."""
    session = open_session(selector="exact", completion="none", budget="8")
    stats = run(session, ids(200), 1)
    n_sealed = 4 * session.cache.offloaded[0].n_pages
    assert stats.read_tokens_per_step == pytest.approx(n_sealed / 2 + 8)
    assert stats.decode_bytes_read["cpu"] == (n_sealed / 2 + 8) * N_LAYERS * N_HEADS * TOKEN_BYTES


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_written_are_the_sealed_pages(open_session, ids, offload):
    session = open_session(offload=offload)
    stats = run(session, ids(203), 30)
    n_pages = (203 + 30 - 4 - 8) // 4  # 4 sinks, at least 8 recent
    assert {layer.n_pages for layer in session.cache.offloaded} == {n_pages}
    assert total(stats.bytes_written) == stats.bytes_written[offload]
    if offload == "cpu":
        assert stats.bytes_written["cpu"] == n_pages * 4 * TOKEN_BYTES * N_HEADS * N_LAYERS


def test_on_the_device_tier_nothing_moves(open_session, ids):
    stats = run(open_session(offload="none", completion="none"), ids(200), 4)
    assert (total(stats.bytes_read), total(stats.bytes_written)) == (0, 0)
    assert (stats.read_share, stats.charged_share) == (0.0, 0.0)


def test_before_any_step_there_is_nothing_to_say(open_session):
    stats = open_session().stats()
    assert (stats.prompt_tokens, stats.new_tokens, stats.resident_bytes) == (0, 0, 0)
    assert stats.ttft_s is stats.tpot_ms is stats.read_share is stats.completion_mass is stats.hit_rate is None
    assert total(stats.bytes_read) == total(stats.bytes_written) == 0


def test_tokens_and_times_are_counted(open_session, ids):
    session = open_session()
    session.prefill(ids(60))
    session.prefill(ids(20, 1))
    session.generate(SamplingConfig(max_new_tokens=6))
    stats = session.stats()
    assert (stats.prompt_tokens, stats.new_tokens) == (80, 6)
    assert stats.ttft_s > 0
    assert stats.tpot_ms > 0
    assert stats.as_dict()["prompt_tokens"] == 80


def test_hits_are_a_share_of_what_was_asked_for(open_session, ids):
    cold = run(open_session(gpu_cache="off"), ids(200), 8)
    warm = run(open_session(gpu_cache="1MiB", selector="uniform", pool="none"), ids(200), 8)
    assert cold.hit_rate == 0.0
    assert 0.5 < warm.hit_rate < 1.0
    assert total(warm.decode_bytes_read) < total(cold.decode_bytes_read)


def resident(open_session, ids, n_tokens, **fields):
    session = open_session(budget="32", **fields)
    return run(session, ids(n_tokens), 3)


@pytest.mark.parametrize("completion", ["anchored", "phi", "none"])
def test_with_the_index_on_the_host_the_device_holds_the_same_at_any_length(open_session, ids, completion):
    short, long = (
        resident(open_session, ids, n, index="cpu", selector="quantized", completion=completion) for n in (200, 1000)
    )
    assert short.resident_bytes == long.resident_bytes > 0
    assert short.index_host_bytes < long.index_host_bytes


def test_with_the_index_on_the_device_it_is_resident_and_grows(open_session, ids):
    short, long = (resident(open_session, ids, n, index="device", selector="quantized") for n in (200, 1000))
    assert short.resident_bytes < long.resident_bytes
    assert short.index_host_bytes == long.index_host_bytes == 0


def test_resident_bytes_are_the_parts_that_can_be_counted_by_hand(open_session, ids):
    stats = resident(open_session, ids, 500, index="cpu", completion="anchored")
    anchors = (4 + 8 + 4) * TOKEN_BYTES
    summary = 32 * (16 + 16 + 2) * 4 + (16 + 16) * 4  # and the sums of the newest segment, before rounding
    step = N_HEADS * 32 * TOKEN_BYTES  # one layer's pages at a time
    assert stats.resident_bytes == N_LAYERS * N_HEADS * (anchors + summary) + step


def test_pages_on_the_device_are_resident(open_session, ids):
    away, here = (resident(open_session, ids, 500, index="cpu", offload=tier) for tier in ("cpu", "none"))
    n_pages = (500 + 3 - 4 - 8) // 4
    assert here.resident_bytes - away.resident_bytes == N_LAYERS * N_HEADS * n_pages * 4 * TOKEN_BYTES


def test_a_summary_that_grows_is_resident(open_session, ids):
    short, long = (resident(open_session, ids, n, index="cpu", completion="pages") for n in (200, 1000))
    assert short.resident_bytes < long.resident_bytes


@pytest.mark.parametrize("completion", ["anchored", "anchored+phi+pages", "exact", "none"])
def test_a_gated_run_says_how_many_heads_abstain(open_session, ids, completion):
    session = open_session(gate=True, completion=completion)
    stats = run(session, ids(300), 3)
    choices = [int(c) for layer in session.cache.offloaded for c in layer.gate.choice.flatten()]
    assert len(choices) == N_LAYERS * 4
    assert stats.gate_abstain_share == pytest.approx(choices.count(0) / len(choices))
    assert {"exact": stats.gate_abstain_share == 0.0, "none": stats.gate_abstain_share == 1.0}.get(completion, True)


def test_without_a_gate_nothing_abstains(open_session, ids):
    assert run(open_session(), ids(200), 3).gate_abstain_share is None


@pytest.mark.parametrize("offload", ["cpu", "nvme"])
def test_what_reanchoring_reads_is_in_the_reads_and_told_apart(open_session, ids, offload):
    sessions = [open_session(reanchor=n, offload=offload, completion="pages") for n in (16, "off")]
    anchored, plain = (run(session, ids(300), 30) for session in sessions)
    refresh = total(anchored.refresh_bytes_read)
    page_bytes = 4 * N_HEADS * TOKEN_BYTES
    assert refresh >= N_LAYERS * (300 + 16 - 4 - 8) // 4 * page_bytes
    assert total(plain.refresh_bytes_read) == 0
    n_steps = sessions[0].cache.offloaded[0].meter.steps
    background = refresh / (n_steps * N_LAYERS * N_HEADS * TOKEN_BYTES)
    apart = 0.2 * plain.read_tokens_per_step if offload == "nvme" else 1e-6  # runs of pages vary in files
    assert anchored.read_tokens_per_step == pytest.approx(plain.read_tokens_per_step + background, abs=apart)
    prefill = sum(m.cpu + m.nvme for m in (layer.fetch.prefill.total() for layer in sessions[0].cache.offloaded))
    assert total(anchored.bytes_read) == total(anchored.decode_bytes_read) + prefill + refresh


@pytest.mark.parametrize("completion", ["keepkv", "keepkv+none"])
def test_keys_that_keepkv_clamps_are_counted_and_told(open_session, ids, monkeypatch, completion):
    """Where every factor is out of range, those are all entries of more than one token."""
    monkeypatch.setattr(keepkv, "_FACTORS", (float("inf"), float("inf")))
    session = open_session(completion=completion, gate="+" in completion, reanchor="off")
    stats = run(session, ids(200), 3)
    parts = [layer.completion for layer in session.cache.offloaded]
    parts = [part.candidates[0] if "+" in completion else part for part in parts]
    votes = [part._log_weights.view.exp().round() for part in parts]
    assert stats.clamped_entries == sum(int((v > 1).sum()) for v in votes) > 0
    assert f" · {stats.clamped_entries:,} entries clamped · " in statistics_line(stats)


def test_without_clamps_none_are_told(open_session, ids):
    stats = run(open_session(completion="chelsea"), ids(200), 3)
    assert stats.clamped_entries == 0
    assert "clamped" not in statistics_line(stats)


def test_reads_ahead_that_no_step_waited_for_are_in_every_account(open_session, ids, monkeypatch):
    """The sweep asks the layers itself; both must see what came for a step that never was."""
    session = open_session(offload="nvme", cpu_max="64KiB", prefetch=0.5, budget="10%")
    session.prefill(ids(300))
    session.step(3)
    layers = session.cache.offloaded
    before = sum(layer.fetch.decode.moved.nvme for layer in layers)
    monkeypatch.setattr(layers[0].fetch.store, "moved_unasked", lambda layer: Moved(nvme=4096))  # a read that came late
    Reads.of(layers)
    assert sum(layer.fetch.decode.moved.nvme for layer in layers) >= before + 4096
