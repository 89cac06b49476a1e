"""``kvoffload plan`` and ``kvoffload env``."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvoffload.runtime import command


def test_plan_prints_a_table_or_one_object(kvoffload: Any) -> None:
    ran = kvoffload("plan", "--model", "tiny", "--context", "8k")
    assert ran.code == 0
    assert ran.out.startswith("tiny: 8,192 tokens, 1 KiB a token, KV 8 MiB, offload cpu, budget 410 tok a step\n")
    assert "index (transform)" in ran.out
    told = json.loads(kvoffload("plan", "--model", "tiny", "--json", "--batch", "2", "--offload", "nvme").out)
    assert (told["context"], told["batch"], told["kv_bytes"], told["problem"]) == (8192, 2, 1 << 24, None)


def test_a_plan_that_does_not_fit_is_printed_and_exits_with_3(kvoffload: Any) -> None:
    ran = kvoffload("plan", "--model", "llama-3.1-8b-shape", "--cpu-max", "1G")
    assert ran.code == 3
    assert "KV pages" in ran.out
    assert "--cpu-max allows 1 GiB" in ran.err


def test_a_plan_for_a_gpu_can_be_made_without_one(kvoffload: Any) -> None:
    assert "device" in kvoffload("plan", "--model", "tiny", "--device", "cuda:7").out


def test_env_reports_and_fails_when_something_required_is_missing(
    kvoffload: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kvoffload.runtime import doctor

    real = doctor.inspect
    monkeypatch.setattr(command, "inspect", lambda required, folder: real(required, folder, seconds=0.01))
    monkeypatch.setattr(doctor, "_cuda", lambda: doctor.Feature(False, "no driver"))
    ran = kvoffload("env", "--nvme-dir", str(tmp_path), "--require", "cuda, aiofiles")
    assert ran.code == 1
    assert ran.out.endswith("missing: cuda (no driver)\n")
    ran = kvoffload("env", "--nvme-dir", str(tmp_path), "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["features"]["cuda"] == {"present": False, "note": "no driver"}
