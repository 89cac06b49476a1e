"""What this machine offers: versions, GPUs, pinned memory, direct I/O, engines and disk speed."""

import platform
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvoffload.errors import UsageError
from kvoffload.units import format_size

PACKAGES = (
    "kvoffload", "torch", "transformers", "triton", "numpy", "pydantic", "safetensors", "aiofiles", "xxhash", "gguf",
    "liburing", "fastapi", "lm-eval", "matplotlib",
)  # fmt: skip
_NVIDIA_FS = Path("/proc/driver/nvidia-fs")
FEATURES = ("cuda", "pinned", "triton", "o_direct", "aio", "uring", "aiofiles", "gds")


@dataclass(frozen=True)
class Feature:
    """Something that may be asked for; ``note`` says what was found, or why it is missing."""

    present: bool
    note: str = ""

    def __str__(self) -> str:
        return ("yes" if self.present else "no") + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Report:
    """What ``kvoffload env`` prints."""

    versions: dict[str, str | None]
    gpus: tuple[str, ...]
    features: dict[str, Feature]
    disk: dict[str, Any]
    memory: dict[str, int | None]
    required: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Required features that are not there."""
        return tuple(name for name in self.required if not self.features[name].present)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "missing": list(self.missing)}

    def rows(self) -> list[tuple[str, str]]:
        """Name and finding, for a table."""
        rows = [(name, found or "not installed") for name, found in self.versions.items()]
        rows += [("gpu", name) for name in self.gpus or ("none",)]
        rows += [(name, str(feature)) for name, feature in self.features.items()]
        rows += [(f"disk {name}", str(value)) for name, value in self.disk.items()]
        rows += [(name, "no limit found" if n is None else format_size(n)) for name, n in self.memory.items()]
        return rows


def inspect(required: Iterable[str] = (), nvme_dir: Path | None = None, *, seconds: float = 0.5) -> Report:
    """Look at everything; the disk is measured for about twice ``seconds``. Raises UsageError for unknown features."""
    required = tuple(required)
    if unknown := sorted(set(required) - set(FEATURES)):
        raise UsageError(f"--require: {unknown[0]!r} is unknown; accepted: {', '.join(FEATURES)}")
    folder = nvme_dir or Path(tempfile.gettempdir())
    disk, direct = _look_at_disk(folder, seconds, keeps=nvme_dir is not None)
    return Report(
        versions={"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}},
        gpus=_gpus(),
        features={"cuda": _cuda(), "pinned": _pinned(), "triton": _triton(), "o_direct": direct, **_engines(nvme_dir)},
        disk=disk,
        memory=_memory(),
        required=required,
    )


def package_version(package: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> tuple[str, ...]:
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(f"{gpu.name}, {format_size(gpu.total_memory)}" for gpu in found)


def _cuda() -> Feature:
    import torch

    if torch.version.cuda is None:
        return Feature(False, "this torch was built without CUDA")
    return Feature(torch.cuda.is_available(), f"CUDA {torch.version.cuda}")


def _pinned() -> Feature:
    import torch

    if not torch.cuda.is_available():
        return Feature(False, "needs CUDA")
    try:
        return Feature(torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True).is_pinned())
    except RuntimeError as error:
        return Feature(False, str(error).splitlines()[0])


def _triton() -> Feature:
    found = package_version("triton")
    return Feature(found is not None, "the slower reference kernels are used" if found is None else "")


def _engines(nvme_dir: Path | None) -> dict[str, Feature]:
    from kvoffload_storage.engines import available_engines

    reasons = available_engines(nvme_dir)
    found = {name: Feature(not reasons[name], reasons[name]) for name in ("aio", "uring", "aiofiles", "gds")}
    if found["gds"].present and not _NVIDIA_FS.exists():
        found["gds"] = Feature(True, "nvidia-fs is not loaded: cuFile may go through host memory")
    return found


def _look_at_disk(folder: Path, seconds: float, *, keeps: bool) -> tuple[dict[str, Any], Feature]:
    from kvoffload_storage.disk import keep_read_unit, measure_disk
    from kvoffload_storage.errors import StorageError

    try:
        speed = measure_disk(folder, seconds)
        if keeps:
            keep_read_unit(folder, speed.read_unit)
    except StorageError as error:
        return {"folder": str(folder), "problem": str(error)}, Feature(False, str(error))
    found = {
        "folder": str(folder),
        "write_mb_s": round(speed.write_mb_s),
        "read_mb_s": round(speed.read_mb_s),
        "read_iops": round(speed.read_iops),
        "read_unit": format_size(speed.read_unit),
    }
    return found, Feature(speed.direct, speed.direct_note)


def _memory() -> dict[str, int | None]:
    import torch

    from kvoffload.runtime.limits import find_limits

    limits = find_limits(torch.device("cpu"), None, with_disk=False)
    return {"free_host_bytes": limits.host, "locked_limit_bytes": limits.locked}
