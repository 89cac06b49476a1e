"""From settings to a loaded model on a measured machine; what can be refused is refused before weights load."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvoffload.bench.ceilings import Ceilings, calibrate
from kvoffload.bench.clock import Clock
from kvoffload.bench.output import Output
from kvoffload.errors import UsageError
from kvoffload.models.catalog import (
    LoadedModel,
    load_config,
    load_model,
    pick_device,
    pick_dtype,
    resolve,
    weight_bytes,
)
from kvoffload.models.fingerprint import check_calibrations
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.limits import Limits, find_limits
from kvoffload.runtime.page_size import settle_page_size
from kvoffload.runtime.plan import make_plan
from kvoffload.settings import Settings
from kvoffload.units import parse_size


@dataclass(frozen=True)
class Bench:
    """A runtime with a model that is still to be compared with dense attention, and what this machine can do."""

    runtime: Runtime
    loaded: LoadedModel
    clock: Clock
    ceilings: Ceilings

    @property
    def vocabulary(self) -> int:
        return int(self.loaded.config.get_text_config(decoder=True).vocab_size)


def begin(settings: Settings, flags: Mapping[str, Any], output: Output, *, context: int, batch: int) -> Bench:
    """Check that everything fits, measure the machine and tell its ceilings, then load the model."""
    device = pick_device(settings.device)
    source = resolve(settings.model or "", revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    model_config = load_config(source)
    dtype = pick_dtype(settings.dtype, model_config, device)
    config = settle_page_size(settings.runtime().for_long(), model_config, dtype)
    check_calibrations(settings.calibrations, source)
    for doubt in config.doubts:
        output.view.warn(doubt)
    limits = find_limits(device, settings.nvme_dir, with_disk=config.offload == "nvme")
    limits = _limit(limits, device, flags.get("device_max"))
    n_bytes = weight_bytes(model_config, dtype, trust_remote_code=settings.trust_remote_code)
    make_plan(
        model_config, config, context, batch, dtype=dtype, device=device, limits=limits, weight_bytes=n_bytes
    ).check()
    output.phases.start()
    clock, phase = Clock(device), output.phases.phase
    if clock.has_graphs:
        output.phases.watch()
    with phase("ceilings"):
        ceilings = calibrate(clock, dtype, _made(disk_folder(settings.nvme_dir)) if config.offload == "nvme" else None)
    output.tell_ceilings(ceilings.rows())
    with phase("weights"):
        loaded = load_model(source, dtype=dtype, device=device, on_progress=output.view.load)
    config = config.model_copy(update={"self_test": False})  # the gate that follows is stricter
    return Bench(Runtime(loaded, config), loaded, clock, ceilings)


def disk_folder(given: Path | None) -> Path:
    """Where files of a benchmark go."""
    return given or Path(tempfile.gettempdir())


def _made(folder: Path) -> Path:
    """Page files would make it too."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _limit(limits: Limits, device: torch.device, device_max: str | None) -> Limits:
    """Let torch use ``device_max`` of a GPU at most."""
    if device_max is None:
        return limits
    if device.type != "cuda":
        raise UsageError(f"device_max: {device_max!r} bounds a GPU's memory, and the device is {device}")
    try:
        n_bytes = parse_size(device_max)
    except ValueError as error:
        raise UsageError(f"device_max: {error}") from None
    total = torch.cuda.get_device_properties(device).total_memory
    number = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(min(n_bytes / total, 1.0), number)
    return replace(limits, device=min(n_bytes, limits.device or n_bytes))
