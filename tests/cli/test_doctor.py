"""What the machine offers, and what is missing of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvoffload.errors import UsageError
from kvoffload.runtime import doctor
from kvoffload.runtime.doctor import FEATURES, Feature, inspect


def test_a_report_covers_every_feature_and_measures_the_disk(tmp_path: Path) -> None:
    report = inspect([], tmp_path, seconds=0.01)
    assert set(report.features) == set(FEATURES)
    assert report.versions["torch"] is not None
    assert report.disk["read_iops"] > 0
    assert report.missing == ()
    assert [file.name for file in tmp_path.iterdir()] == ["read-unit"]
    assert json.loads(json.dumps(report.as_dict()))["disk"]["folder"] == str(tmp_path)
    assert all(isinstance(cell, str) for row in report.rows() for cell in row)


def test_a_required_feature_that_is_not_there_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"aio": Feature(True), "uring": Feature(False, "seccomp"), "aiofiles": Feature(True)}
    monkeypatch.setattr(doctor, "_engines", lambda folder: found)
    report = inspect(["uring", "aiofiles"], tmp_path, seconds=0.01)
    assert report.missing == ("uring",)
    assert ("uring", "no (seccomp)") in report.rows()
    assert report.as_dict()["missing"] == ["uring"]


def test_an_unknown_feature_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'tape' is unknown; accepted: cuda, pinned, triton, o_direct, aio"):
        inspect(["tape"])


def test_a_disk_that_cannot_be_used_is_a_finding_and_no_failure() -> None:
    report = inspect(["o_direct"], Path("/proc/none"), seconds=0.01)
    assert report.missing == ("o_direct",)
    assert "problem" in report.disk


def test_gpus_and_pinned_memory_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "H100", 80 << 30

    def no_pinning(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("cannot pin\ndetails")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch, "empty", no_pinning)
    assert doctor._gpus() == ("H100, 80 GiB",)
    assert doctor._cuda() == Feature(True, "CUDA 13.0")
    assert doctor._pinned() == Feature(False, "cannot pin")


def test_the_doctor_loads_no_model_library() -> None:
    script = "import kvoffload.runtime.doctor, sys; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(("loaded", "note"), [(True, ""), (False, "cuFile may go through host memory")])
def test_gpudirect_without_its_kernel_module_is_told(
    loaded: bool, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvoffload_storage.engines.choice.why_no_gds", lambda folder: "")
    monkeypatch.setattr(doctor, "_NVIDIA_FS", tmp_path if loaded else tmp_path / "none")
    found = doctor._engines(tmp_path)["gds"]
    assert (found.present, note in found.note, bool(found.note)) == (True, True, bool(note))
