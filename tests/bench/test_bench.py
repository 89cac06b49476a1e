"""``kvoffload bench``: what it measures is exact, counted, and told; what it cannot measure is told too."""

import io
import json
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvoffload import cli
from kvoffload.bench import copies, disk, options
from kvoffload.bench.ceilings import Ceilings, StepBytes, read_weight_bytes
from kvoffload.bench.clock import Clock, Timing
from kvoffload.bench.decode import DecodeBench, DecodePlan
from kvoffload.bench.gate import GateError, compare
from kvoffload.bench.imposed import draw_trace
from kvoffload.bench.kernels import kernels_of
from kvoffload.bench.phases import KERNELS, Phases
from kvoffload.bench.prompt_kv import PromptKv
from kvoffload.bench.runs import FULL, Case, Contender, OurRun, Run, on_device, ours, selection_only, stock
from kvoffload.cache.packed import unpack_slices
from kvoffload.config import RuntimeConfig
from kvoffload.errors import OutOfRoomError, UsageError
from kvoffload.models.catalog import load_model, resolve
from kvoffload.models.stock import cache_tensors, stock_cache

SMALL = {"sinks": 4, "recent": 8, "page_size": 4}
DECODE = ["bench", "decode", "--model", "tiny", "--context", "512", "--steps", "2", "--read-tokens", "64", "--json"]
CPU = Clock(torch.device("cpu"))
CEILINGS = Ceilings("none", link_gb_s=50.0, copy_gb_s=2000.0, gemv_gb_s=2500.0, gemm_tflop_s=1.0, disk_gb_s=2.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(resolve("tiny"), dtype="float32", device="cpu").model


@pytest.fixture
def kvoffload(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.run(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def report(ran: tuple[int, str, str]) -> Any:
    code, out, err = ran
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def decoded() -> Any:
    """The report of one decode benchmark with all peers."""
    with redirect_stdout(io.StringIO()) as out:
        assert cli.run(DECODE) == 0
    return json.loads(out.getvalue().splitlines()[-1])


def test_every_peer_is_measured_or_left_out_with_the_reason(decoded: Any) -> None:
    assert list(decoded["runs"]) == ["ours", "dense", "dynamic", "selection", "ahead", "resident"]
    assert decoded["left_out"] == {"offloaded": "DynamicCache(offloading=True) needs a CUDA device"}
    assert set(decoded["speedup_over"]) == {"dense", "dynamic", "selection", "ahead", "resident"}
    assert all(run["step_ms"]["median"] > 0 for run in decoded["runs"].values())


def test_what_is_timed_was_compared_with_dense_attention(decoded: Any) -> None:
    assert set(decoded["gate"]) == {"ours", "dense", "selection", "ahead", "resident"}
    assert all(0 <= error < 1e-4 for error in decoded["gate"].values())


def test_a_report_says_where_the_time_of_the_run_went(decoded: Any) -> None:
    seconds = decoded["seconds"]
    before = ["start", "ceilings", "weights", "prompt", "gate: the library's own"]
    gate = [f"gate: {name}" for name in decoded["gate"]]
    runs = [f"{name}: {phase}" for name in decoded["runs"] for phase in ("KV", "warm-up", "timing")]
    assert list(seconds) == before + gate + runs
    timed = 2 * decoded["runs"]["ours"]["step_ms"]["mean"] / 1e3
    assert timed <= seconds["ours: timing"] + 1e-3 < sum(seconds.values())


def test_a_model_is_tested_once_by_the_gate(kvoffload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def test_again(*_: Any) -> None:
        raise AssertionError("its kernels have other sizes, each of which is compiled")

    monkeypatch.setattr("kvoffload.runtime.engine.check_parity", test_again)
    report(kvoffload(*DECODE, "--peers", "none"))


def test_a_phase_tells_what_compiling_kernels_took_of_it() -> None:
    lines: list[str] = []
    phases = Phases(lines.append)
    with phases.phase("gate"):
        phases._count(times=SimpleNamespace(total=1_500_000), cache_hit=False, src=None)
        phases._count(times=SimpleNamespace(total=9_000_000), cache_hit=True, src=None)
    with suppress(RuntimeError), phases.phase("ours: KV"):
        raise RuntimeError
    assert lines == ["gate 0.0 s, 1.5 of them for compiling 1 kernels", "ours: KV 0.0 s"]
    assert phases.as_dict()[KERNELS] == 1.5


def test_a_step_reads_its_budget_and_its_floor_follows_from_the_bytes(decoded: Any) -> None:
    run = decoded["runs"]["ours"]
    touched, ceilings = run["bytes_a_step"], decoded["ceilings"]
    assert touched["fetched"] == 64 * 4 * 2 * 2 * 16 * 4  # tokens, layers, kv heads, K and V, head size, fp32
    assert run["read_tokens_per_step"] == 64
    on_device = touched["weights"] + touched["index"] + touched["completion"]
    memory = max(ceilings["copy_gb_s"], ceilings["gemv_gb_s"])
    floor_s = max(on_device / memory, touched["fetched"] / ceilings["link_gb_s"]) / 1e9
    assert run["floor_ms"] == pytest.approx(floor_s * 1e3, rel=2e-3)
    assert run["ratio_to_floor"] == pytest.approx(run["step_ms"]["median"] / run["floor_ms"], rel=2e-2)


def test_dense_peers_read_all_kv_on_the_device(decoded: Any) -> None:
    token = 4 * 2 * 2 * 16 * 4
    assert decoded["runs"]["dense"]["bytes_a_step"]["kv"] == (512 - 2 - 8 + 1) * token
    assert decoded["runs"]["dynamic"]["bytes_a_step"]["kv"] == 512 * token
    assert decoded["runs"]["selection"]["bytes_a_step"]["completion"] == 0


def test_imposed_hits_are_what_the_page_cache_finds(kvoffload: Any) -> None:
    flags = ["--gpu-cache", "128KiB", "--hit-share", "0.75", "--steps", "16", "--peers", "none", "--selector", "bounds"]
    run = report(kvoffload(*DECODE, *flags))["runs"]["ours"]
    assert run["budget_tokens"] == 64
    assert run["bytes_a_step"]["fetched"] == pytest.approx(0.25 * 64 * 4 * 2 * 2 * 16 * 4)


def test_an_imposed_trace_keeps_its_share_and_has_no_slice_twice() -> None:
    trace = draw_trace(24, 4, 200, 0.75, seed=0)
    steps = [set(map(tuple, step.T.tolist())) for step in trace]
    assert all(len(step) == 24 for step in steps)
    assert all(len(before & after) == 18 for before, after in pairwise(steps))
    assert not (steps[5] - steps[4]) & set.union(*steps[:4])


def test_hits_can_be_imposed_on_a_page_cache_only(kvoffload: Any) -> None:
    code, _, err = kvoffload(*DECODE, "--hit-share", "0.9")
    assert code == 2
    assert "hit_share: 0.9 needs a page cache to hit: give --gpu-cache" in err


@pytest.mark.parametrize(
    ("touched", "tier", "expected_ms"),
    [
        (StepBytes(weights=4_000_000_000, index=500_000_000, completion=500_000_000, fetched=1e8), "cpu", 2.0),
        (StepBytes(weights=2_500_000_000, fetched=1e8), "cpu", 2.0),
        (StepBytes(weights=2_500_000_000, fetched=1e8), "nvme", 50.0),
        (StepBytes(weights=2_500_000_000, kv=2_500_000_000, fetched=1e12), "none", 2.0),
    ],
)
def test_the_floor_is_the_slower_of_memory_and_link(touched: StepBytes, tier: str, expected_ms: float) -> None:
    assert touched.floor_s(CEILINGS, tier) * 1e3 == pytest.approx(expected_ms)


def test_weights_of_a_step_leave_the_input_embedding_out_unless_it_is_the_output_too(model: Any) -> None:
    everything = sum(p.nbytes for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    assert read_weight_bytes(model) == everything - embedding.nbytes
    head = model.lm_head.weight
    model.lm_head.weight = embedding
    try:
        assert read_weight_bytes(model) == everything - head.nbytes
    finally:
        model.lm_head.weight = head


def test_every_runtime_is_filled_with_the_same_kv(model: Any) -> None:
    kv, n_tokens = PromptKv(model, 2, 600), 600
    expected = cache_tensors(stock_cache(model, kv.layers(2, n_tokens), offloading=False))
    config = RuntimeConfig(budget="10%", **SMALL)
    run = OurRun(model, config, kv, Case(n_tokens, 2, room=8))
    with run.cache:
        for i, layer in enumerate(run.cache.offloaded):
            memory = layer.store.mapped(layer.layer)
            assert memory is not None
            pages = unpack_slices(memory[: layer.n_pages], layer.geometry)
            for given, buffer, wanted in zip(pages, layer.anchors.buffers, expected[2 * i : 2 * i + 2], strict=True):
                sinks, window = layer.anchors.in_order(buffer)
                whole = torch.cat([sinks, given.transpose(0, 1).flatten(1, 2), window], 1)
                torch.testing.assert_close(whole, wanted.flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_fewer_sequences_have_the_same_kv(model: Any) -> None:
    kv = PromptKv(model, 3, 300)
    for two, three in zip(kv.layers(2, 300), kv.layers(3, 300), strict=True):
        assert torch.equal(two[0], three[0][:2])
        assert torch.equal(two[1], three[1][:2])


@pytest.mark.parametrize("which", ["ours", "selection", "resident"])
def test_nothing_is_timed_where_the_gate_fails(which: str, kvoffload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = OurRun.step

    def wrong(self: OurRun, ids: torch.Tensor) -> torch.Tensor:
        kinds = {"resident": self._tier == "none", "selection": self.cache.config.completion[0].kind == "none"}
        mine = next((name for name, holds in kinds.items() if holds), "ours")
        return honest(self, ids) * (1.001 if mine == which else 1.0)

    monkeypatch.setattr(OurRun, "step", wrong)
    code, out, err = kvoffload(*DECODE, "--peers", "selection,resident")
    assert code == 1
    assert out == ""
    assert f"error: {which} differs from dense attention by" in err
    assert "ms a step" not in err


def test_in_bf16_the_librarys_own_rounding_bounds_ours() -> None:
    expected = torch.ones(2, 1, 100, dtype=torch.bfloat16)
    given = expected.float() * 1.04
    assert compare("ours", given, expected, rounding=0.03) == pytest.approx(0.04, rel=1e-3)
    for rounding in (0.0, 0.02):
        with pytest.raises(GateError, match="ours differs"):
            compare("ours", given, expected, rounding)
    with pytest.raises(GateError, match="ours differs"):
        compare("ours", given, expected.float(), rounding=0.03)


class Sized(Run):
    """A step of nothing, for two sequences at most."""

    kv_bytes = 1

    def __init__(self, n_sequences: int) -> None:
        if n_sequences > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much")
        self._n = n_sequences

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        assert len(ids) == self._n
        return torch.rand(self._n, 4)

    def step_bytes(self, n_steps: int) -> StepBytes:
        return StepBytes(weights=1000)


@contextmanager
def sized(case: Case) -> Any:
    yield Sized(case.n_sequences)


def test_a_dense_peer_is_measured_with_as_many_sequences_as_fit() -> None:
    bench = DecodeBench(DecodePlan(512, 4, 2, 512), CPU, CEILINGS, 4)
    measured = bench.measure(Contender("dense", sized, is_dense=True))
    assert measured.n_sequences == 2
    assert measured.tokens_per_s == pytest.approx(2 / measured.step.median)
    with pytest.raises(OutOfRoomError, match=r"ours: 512 tokens do not fit on the device: CUDA out of memory$"):
        bench.measure(Contender("ours", sized))


def test_slow_peers_make_fewer_steps() -> None:
    bench = DecodeBench(DecodePlan(512, 1, 6, 512), CPU, CEILINGS, 4)
    assert len(bench.measure(Contender("slow", sized, most_steps=3)).step.seconds) == 3


def test_only_the_completion_or_the_tier_differs_in_our_own_peers(model: Any) -> None:
    config = RuntimeConfig(selector="quantized:bits=2", budget="128", gpu_cache="1MiB", **SMALL)
    alone, resident = selection_only(config), on_device(config)
    assert (alone.completion[0].kind, alone.selector, alone.gpu_cache) == ("none", config.selector, 1 << 20)
    assert (resident.offload, resident.budget, resident.completion) == ("none", FULL, config.completion)
    assert stock("dynamic", model, None, offloading=False).exact_steps == 0  # type: ignore[arg-type]
    assert ours("ours", model, config, None).tier == "cpu"  # type: ignore[arg-type]


def test_timings_are_medians_of_what_was_run() -> None:
    timing = Timing((0.001, 0.005, 0.002, 0.003, 0.1, 0.004, 0.006, 0.007, 0.008, 0.009))
    assert timing.as_ms() == {"median": 5.5, "mean": 14.5, "p90": 9.0}
    calls: list[int] = []
    assert len(CPU.on_device(lambda: calls.append(1), 3, warm_up=2).seconds) == 3
    assert len(calls) == 5
    assert CPU.peak_bytes() is None
    assert kernels_of(lambda: None, CPU, 5) == ()


def test_a_prefill_is_compared_and_timed_beside_the_librarys(kvoffload: Any) -> None:
    told = report(kvoffload("bench", "prefill", "--model", "tiny", "--context", "300", "--runs", "2", "--json"))
    assert told["gate"] < 1e-4
    assert list(told["runs"]) == ["ours", "stock"]
    assert told["ratio_to_stock"] == pytest.approx(
        told["runs"]["ours"]["seconds"] / told["runs"]["stock"]["seconds"], rel=0.1
    )
    assert told["layer_kv_bytes"] == 300 * 2 * 2 * 16 * 4


def test_the_gather_is_timed_beside_a_copy_of_as_many_bytes(kvoffload: Any) -> None:
    sizes = ["--launches", "4KiB,64KiB", "--chunks", "256,8KiB", "--source", "1MiB"]
    told = report(kvoffload("bench", "copy", *sizes, "--json"))
    assert [(row["launch_bytes"], row["chunk_bytes"]) for row in told["rows"]] == [
        (4096, 256), (65536, 256), (65536, 8192)
    ]  # fmt: skip
    assert all(row["gather_us"] > 0 and row["copy_us"] > 0 for row in told["rows"])


def test_a_gather_that_brings_other_bytes_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "gather_slices", lambda rows, ids, out, *rest: out.copy_(rows[: len(out)]))
    with pytest.raises(GateError, match="brought other bytes"):
        list(copies.measure_copies(CPU, [4096], [256], 1 << 20))


def test_page_reads_are_timed_and_fio_is_left_out_where_it_is_not(
    kvoffload: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "which", lambda name: None)
    monkeypatch.setattr(disk, "_ROUNDS", 1)
    flags = ["--mb", "64", "--seconds", "0.1", "--engines", "threads,uring", "--json"]
    monkeypatch.setattr(options, "why_not", lambda name, folder: "seccomp" if name == "uring" else "")
    told = report(kvoffload("bench", "io", "--nvme-dir", str(tmp_path), *flags))
    assert told["left_out"] == {"uring": "seccomp", "fio": "fio is not installed"}
    assert [(row["engine"], row["page_bytes"], row["depth"]) for row in told["rows"]] == [
        ("threads", 64 << 10, 8), ("threads", 256 << 10, 8)
    ]  # fmt: skip
    assert all(min(row["ours"]["mb_s"]) > 0 and row["fio"] == {} for row in told["rows"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("decode", "model: give one with --model"),
        ("decode --model tiny --context many", "context: 'many' is not a number of tokens"),
        ("decode --model tiny --context 100", "context: 100 tokens are too few"),
        ("decode --model tiny --peers vllm", "peers: 'vllm' is unknown; accepted: all, none, dense"),
        ("decode --model tiny --set bugdet=1", "set: 'bugdet=1' is no setting"),
        ("decode --model tiny --set budget=200%", "budget: '200%' is more than 100%"),
        ("decode --model tiny --read-tokens 64 --budget 5%", "read_tokens: 64 and --budget 5%"),
        ("decode --model tiny --device cpu --device-max 4G", "device_max: '4G' bounds a GPU's memory"),
        ("decode --model tiny --gate-context 20", "gate_context: 20 tokens are too few"),
        ("prefill --model tiny --peers dense", "peers: 'dense' is unknown; accepted: all, none, stock"),
        ("copy --device cpu --chunks 100", "chunks: 100 bytes are no whole words"),
        ("copy --device cpu --launches 1T", "launches: 1,099,511,627,776 bytes are more than the source"),
        ("copy --device cpu --launches 64 --chunks 128", "launches: 64 bytes are less than every chunk"),
        ("io --engines tape", "engines: 'tape' is unknown; accepted: threads, aio, aiofiles, uring, gds"),
        ("io --nvme-dir /nowhere", "nvme_dir: '/nowhere' is no folder"),
    ],
)
def test_bad_input_is_one_line(arguments: str, said: str, kvoffload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("kvoffload.bench.begin.load_model", load)
    code, out, err = kvoffload("bench", *arguments.split())
    assert code == 2
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {said}")


def test_kv_of_sliding_windows_is_not_filled_directly() -> None:
    config = AutoConfig.for_model(
        "gemma3_text", hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
        num_key_value_heads=1, head_dim=16, layer_types=["sliding_attention", "full_attention"], sliding_window=16,
    )  # fmt: skip
    with pytest.raises(UsageError, match="gemma3_text: layers with bounded KV"):
        PromptKv(AutoModelForCausalLM.from_config(config).eval(), 1, 64)
