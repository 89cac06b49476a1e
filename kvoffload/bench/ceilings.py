"""What this machine can do at most, measured in a moment, and the least time that a decode step needs then."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from kvoffload_storage.aligned import aligned_empty
from torch import Tensor

from kvoffload.bench.clock import Clock

GB = 1e9
_REPEATS = 10
_COPY_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}
_GEMV_SHAPE = {"cuda": (28672, 4096), "cpu": (4096, 2048)}
_GEMM_SIZE = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True)
class Ceilings:
    """GB/s (10^9 bytes) and TFLOP/s. ``link`` is the pinned copy from host to device; ``copy`` counts what a copy
    on the device reads and writes; ``gemv`` the weights that matrix-vector products read; ``disk`` random reads of
    64 KiB, where they were measured."""

    device: str
    link_gb_s: float
    copy_gb_s: float
    gemv_gb_s: float
    gemm_tflop_s: float
    disk_gb_s: float | None = None

    @property
    def memory_gb_s(self) -> float:
        """The best rate that the device's memory was seen at."""
        return max(self.copy_gb_s, self.gemv_gb_s)

    def as_dict(self) -> dict[str, Any]:
        return {name: round(v, 3) if isinstance(v, float) else v for name, v in asdict(self).items()}

    def rows(self) -> list[tuple[str, str]]:
        """Name and figure, for a table."""
        told = [
            ("copy from pinned memory", f"{self.link_gb_s:.1f} GB/s"),
            ("copy on the device", f"{self.copy_gb_s:.0f} GB/s read and written"),
            ("matrix-vector products", f"{self.gemv_gb_s:.0f} GB/s of weights"),
            ("matrix products", f"{self.gemm_tflop_s:.1f} TFLOP/s"),
        ]
        disk = [] if self.disk_gb_s is None else [("random reads from the disk", f"{self.disk_gb_s:.2f} GB/s")]
        return [("device", self.device), *told, *disk]


def calibrate(clock: Clock, dtype: torch.dtype, disk_folder: Path | None = None) -> Ceilings:
    """Measure in about a second; the disk, for another one, only where a folder is given."""
    return Ceilings(
        device=device_name(clock.device),
        link_gb_s=_link(clock),
        copy_gb_s=_copy(clock),
        gemv_gb_s=_gemv(clock, dtype),
        gemm_tflop_s=_gemm(clock, dtype),
        disk_gb_s=None if disk_folder is None else _disk(disk_folder),
    )


def device_name(device: torch.device) -> str:
    """The device, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


@dataclass(frozen=True)
class StepBytes:
    """Bytes that one decode step has to touch: on the device (``kv`` are those of KV that lies there), and ``fetched``
    over the link or from the disk."""

    weights: int
    index: int = 0
    completion: int = 0
    kv: int = 0
    fetched: float = 0.0

    def floor_s(self, ceilings: Ceilings, tier: str) -> float:
        """max((weights + index + completion state + KV) / memory, fetched / link): the least time of the step."""
        on_device = (self.weights + self.index + self.completion + self.kv) / (ceilings.memory_gb_s * GB)
        slow = ceilings.disk_gb_s if tier == "nvme" else ceilings.link_gb_s
        if tier == "none" or slow is None:
            return on_device
        return max(on_device, self.fetched / (slow * GB))


def read_weight_bytes(model: Any) -> int:
    """Bytes of the weights that a decode step reads: all but the input embedding, unless the output is tied to it."""
    embedding = model.get_input_embeddings().weight
    head = getattr(model.get_output_embeddings(), "weight", None)
    skipped = embedding.numel() * embedding.element_size() if head is not embedding else 0
    everything: int = sum(p.numel() * p.element_size() for p in model.parameters())
    return everything - skipped


def random_bytes(n_bytes: int, device: torch.device) -> Tensor:
    """uint8 [n_bytes] on the device, never zeros: what is all alike may be moved faster."""
    return torch.randint(1, 256, (n_bytes,), dtype=torch.uint8, device=device)


def _link(clock: Clock) -> float:
    n_bytes = _COPY_BYTES[clock.device.type]
    there = random_bytes(n_bytes, clock.device)
    host = aligned_empty(n_bytes, pinned=clock.has_graphs)
    host.copy_(there)
    return n_bytes / clock.on_device(lambda: there.copy_(host, non_blocking=True), _REPEATS).median / GB


def _copy(clock: Clock) -> float:
    source = random_bytes(_COPY_BYTES[clock.device.type], clock.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.on_device(lambda: target.copy_(source), _REPEATS).median / GB


def _gemv(clock: Clock, dtype: torch.dtype) -> float:
    rows, columns = _GEMV_SHAPE[clock.device.type]
    weight = torch.randn(rows, columns, device=clock.device).to(dtype)
    x = torch.randn(1, columns, device=clock.device).to(dtype)
    time = clock.on_device(lambda: F.linear(x, weight), 2 * _REPEATS).median
    return weight.numel() * weight.element_size() / time / GB


def _gemm(clock: Clock, dtype: torch.dtype) -> float:
    n = _GEMM_SIZE[clock.device.type]
    a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
    return 2 * n**3 / clock.on_device(lambda: a @ b, _REPEATS).median / 1e12


def _disk(folder: Path) -> float:
    from kvoffload_storage.disk import measure_disk

    return measure_disk(folder, 0.5).read_mb_s / 1e3
