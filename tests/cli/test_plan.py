"""Plans: what a config says about its KV, what is needed where, and what does not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from kvoffload.completion.calibrated import Calibration, write_calibration
from kvoffload.config import RuntimeConfig
from kvoffload.errors import OutOfRoomError, UsageError
from kvoffload.layer_budgets import KIND, LADDER, curve_name
from kvoffload.models.catalog import load_config, resolve
from kvoffload.runtime import limits
from kvoffload.runtime.limits import Limits, find_limits, free_disk_bytes, free_host_bytes
from kvoffload.runtime.plan import KVFootprint, Plan, make_plan
from kvoffload.settings import load_settings

CPU, CUDA, GIB = torch.device("cpu"), torch.device("cuda"), 1 << 30
ROOMY = Limits(host=1 << 40, device=1 << 40, disk=1 << 40)


def plan_of(
    name: str = "llama-3.1-8b-shape",
    context: int = 131072,
    batch: int = 1,
    *,
    device: torch.device = CUDA,
    limits: Limits = ROOMY,
    weights: int = 0,
    **flags: Any,
) -> Plan:
    config = load_settings(flags).runtime()
    return make_plan(
        load_config(resolve(name)),
        config,
        context,
        batch,
        dtype=torch.bfloat16,
        device=device,
        limits=limits,
        weight_bytes=weights,
    )


def need(plan: Plan, what: str) -> tuple[str, int]:
    found = [n for n in plan.needs if n.what.startswith(what)]
    assert len(found) == 1
    return found[0].where, found[0].n_bytes


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [("smollm2-135m", 23040), ("llama-3.1-8b-shape", 131072), ("qwen2.5-0.5b-shape", 12288), ("tiny", 512)],
)
def test_bytes_per_token_follow_from_the_config(name: str, bytes_per_token: int) -> None:
    assert KVFootprint.of(load_config(resolve(name)), torch.bfloat16).bytes_per_token == bytes_per_token


def test_only_the_full_layers_of_a_hybrid_grow() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = AutoConfig.for_model(
        "gemma3_text", num_hidden_layers=18, layer_types=kinds * 3, sliding_window=512, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, hidden_size=640,
    )  # fmt: skip
    footprint = KVFootprint.of(config, torch.bfloat16)
    assert (footprint.n_layers, footprint.windows, footprint.bytes_per_token) == (3, (512,) * 15, 3072)
    assert footprint.window_bytes(100) == 15 * 100 * 1024
    assert footprint.window_bytes(10**6) == 15 * 512 * 1024


def test_a_window_without_layer_types_bounds_every_layer() -> None:
    config = AutoConfig.for_model("mistral", num_hidden_layers=2, sliding_window=64)
    assert KVFootprint.of(config, torch.float32).windows == (64, 64)
    config = AutoConfig.for_model("mistral", num_hidden_layers=2, sliding_window=None)
    assert KVFootprint.of(config, torch.float32).n_layers == 2


def test_latent_attention_counts_keys_and_values_as_attention_sees_them() -> None:
    config = AutoConfig.for_model("deepseek_v3", num_hidden_layers=2)
    footprint = KVFootprint.of(config, torch.bfloat16)
    assert (footprint.key_dim, footprint.value_dim) == (192, 128)


def test_pages_are_in_the_tier_that_was_asked_for() -> None:
    size = 16 * GIB
    assert need(plan_of(offload="none"), "KV pages") == ("device", size)
    assert need(plan_of(offload="cpu"), "KV pages") == ("host", size)
    assert need(plan_of(offload="nvme"), "KV pages") == ("disk", size)


def test_pages_on_disk_are_rounded_to_4_kib() -> None:
    plan = plan_of("tiny", context=160, offload="nvme", page_size=4)
    assert need(plan, "KV pages") == ("disk", 4 * 40 * 4096)


def test_a_partly_filled_page_takes_a_whole_one() -> None:
    assert need(plan_of("tiny", context=17), "KV pages") == need(plan_of("tiny", context=32), "KV pages")


def test_a_batch_multiplies_everything_but_the_weights() -> None:
    one, two = plan_of(weights=GIB), plan_of(weights=GIB, batch=2)
    assert need(two, "weights") == need(one, "weights")
    assert two.total("device") - GIB == 2 * (one.total("device") - GIB)
    assert two.kv_bytes == 2 * one.kv_bytes


def test_a_2_bit_index_takes_5_of_64_parts_of_the_kv() -> None:
    where, n_bytes = need(plan_of(selector="quantized"), "index (quantized)")
    assert where == "device"
    assert n_bytes == pytest.approx(16 * GIB * 5 / 64)


def test_an_index_in_host_memory_leaves_the_device_side_constant_but_for_a_steps_pages() -> None:
    flags = {"index": "cpu", "budget": "2048"}
    assert plan_of(context=8192, **flags).total("device") == plan_of(context=131072, **flags).total("device")
    assert need(plan_of(**flags), "index")[0] == "host"


def test_the_completion_has_a_fixed_size() -> None:
    assert need(plan_of(context=8192), "completion") == need(plan_of(context=131072), "completion")


def test_a_gate_keeps_all_its_completions() -> None:
    both = need(plan_of(gate=True, completion="anchored+phi"), "completion")[1]
    assert (
        both == need(plan_of(completion="anchored"), "completion")[1] + need(plan_of(completion="phi"), "completion")[1]
    )


def test_a_page_cache_comes_beside_the_pages_of_one_layers_step() -> None:
    plan = plan_of(gpu_cache="1GiB")
    step = round(0.05 * 131072 * 512) * 8  # 512 bytes a token and kv head, eight kv heads, one layer at a time
    assert need(plan, "pages of a step") == ("device", step)
    lookup = plan.footprint.n_layers * 4 * 8 * 131072 // 16  # four bytes for each of a layer's slices
    assert need(plan, "page cache") == ("device", GIB + lookup)
    assert need(plan_of(gpu_cache="1GiB", offload="nvme"), "page cache") == ("device", GIB)


def test_the_layer_that_reads_most_decides_on_the_pages_of_a_step(tmp_path: Path) -> None:
    file, curves = tmp_path / "b.safetensors", {curve_name(i): torch.zeros(len(LADDER)) for i in range(4)}
    curves[curve_name(2)] = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    header = Calibration(
        completion=KIND, model="tiny", weights="w", data="d", options={}, layers={layer: {} for layer in range(4)}
    )
    write_calibration(file, header, curves)
    even, shared = (need(plan_of("tiny", context=8192, budget="128", **flags), "pages of a step") for flags in (
        {}, {"layer_budgets": file},
    ))  # fmt: skip
    assert shared == (even[0], 2 * even[1])
    full = plan_of("tiny", context=8192, budget="100%", layer_budgets=file)
    assert need(full, "pages of a step") == need(plan_of("tiny", context=8192, budget="100%"), "pages of a step")


@pytest.mark.parametrize(("budget", "tokens"), [("5%", 6553.6), ("2048", 2048), ("16MiB", 128), ("999999", 131072)])
def test_the_budget_is_told_in_token_equivalents_and_never_more_than_the_context(budget: str, tokens: float) -> None:
    assert plan_of(budget=budget).budget_tokens == pytest.approx(tokens)


@pytest.mark.parametrize(
    ("flags", "limits", "told"),
    [
        ({}, Limits(host=GIB), "of host memory, weights included, and 1 GiB is free: use --offload nvme"),
        ({"offload": "none"}, Limits(device=GIB), "of device memory, weights included, and 1 GiB is free: use --off"),
        ({"offload": "nvme"}, Limits(disk=GIB), "need 16 GiB of disk and 1 GiB is free: give --nvme-dir"),
        ({"cpu_max": "15G"}, ROOMY, "KV pages of 131,072 tokens take 16 GiB and --cpu-max allows 15 GiB"),
        ({"offload": "nvme", "nvme_max": "15G"}, ROOMY, "take 16 GiB and --nvme-max allows 15 GiB"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_flag_that_helps(
    flags: dict[str, Any], limits: Limits, told: str
) -> None:
    with pytest.raises(OutOfRoomError) as refused:
        plan_of(limits=limits, **flags).check()
    assert told in str(refused.value)


def test_what_fits_passes_and_unknown_room_is_not_held_against_it() -> None:
    plan_of(offload="nvme", nvme_max="16G").check()
    plan_of(limits=Limits()).check()


def test_on_a_cpu_the_device_shares_the_hosts_memory() -> None:
    plan = plan_of(device=CPU, weights=4 * GIB, limits=Limits(host=18 * GIB))
    assert plan.total("host") == sum(n.n_bytes for n in plan.needs)
    assert {row[1] for row in plan.rows()} == {"host"}
    with pytest.raises(OutOfRoomError, match="host memory"):
        plan.check()


def test_a_low_limit_on_locked_memory_is_told_and_refuses_nothing() -> None:
    plan = plan_of(limits=Limits(host=1 << 40, device=1 << 40, locked=8 << 20))
    plan.check()
    assert plan.as_dict()["locked_memory_limit"] == 8 << 20


def test_the_table_and_the_dictionary_tell_the_same() -> None:
    plan = plan_of(offload="nvme", batch=2)
    told = plan.as_dict()
    assert told["problem"] is None
    assert told["total_bytes"] == {"device": plan.total("device"), "host": plan.total("host"), "disk": 32 * GIB}
    assert ("KV pages", "disk", "32 GiB") in plan.rows()
    assert plan.rows()[-1] == ("total", "disk", "32 GiB of 1 TiB free")
    assert plan_of(limits=Limits()).rows()[-1][2].endswith("of free space unknown")


def test_the_limits_of_this_machine_are_found(tmp_path: Path) -> None:
    found = find_limits(CPU, tmp_path / "not" / "yet", with_disk=True)
    assert found.host is not None
    assert found.host > 1 << 20
    assert found.disk is not None
    assert found.disk > 1 << 20
    assert not (tmp_path / "not").exists()
    assert find_limits(CPU, None, with_disk=False).disk is None


def test_a_folder_that_cannot_be_written_is_out_of_room() -> None:
    with pytest.raises(OutOfRoomError, match="nvme_dir '/proc/none' cannot be written: No such file"):
        free_disk_bytes(Path("/proc/none"))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        free_disk_bytes(tmp_path / "file" / "below")


def test_a_control_group_that_allows_less_than_is_free_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    monkeypatch.setattr(limits, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(limits, "_CGROUP", tmp_path)
    assert free_host_bytes() == 1_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_bytes() == 5_120_000
    monkeypatch.setattr(limits, "_MEMINFO", tmp_path / "none")
    assert free_host_bytes() is None


def test_a_plan_needs_no_runtime_but_its_config() -> None:
    plan = make_plan(
        load_config(resolve("tiny")), RuntimeConfig(), 64, dtype=torch.float32, device=CPU, limits=Limits()
    )
    assert plan.footprint.bytes_per_token == 1024


def test_the_token_oracle_keeps_its_keys_in_host_memory():
    assert need(plan_of(selector="exact"), "index (exact)")[0] == "host"
