"""Admission: what a request needs of each memory, by the plan's figures, and what the server has of it.

Plain arithmetic on bytes: the machine is asked once, after the weights are loaded.
"""

from dataclasses import dataclass
from typing import Any

import torch

from kvoffload.config import RuntimeConfig
from kvoffload.runtime.limits import Limits
from kvoffload.runtime.plan import make_plan
from kvoffload.units import format_size

SHARE = 0.9  # of what is free: activations, buffers and everything else need some too


@dataclass(frozen=True)
class Room:
    """Bytes of host memory, device memory and disk; on a CPU device what the device needs counts as host memory.
    ``host_kv`` and ``disk_kv`` are the pages alone, which --cpu-max and --nvme-max bound."""

    host: float = 0
    device: float = 0
    disk: float = 0
    host_kv: float = 0
    disk_kv: float = 0

    def __add__(self, other: "Room") -> "Room":
        return Room(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    def __sub__(self, other: "Room") -> "Room":
        return Room(**{name: getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__})

    def holds(self, need: "Room") -> bool:
        return self.short_of(need) is None

    def short_of(self, need: "Room") -> str | None:
        """The first memory that is too small for it, with both sizes; None where it fits."""
        told = {"host": "host memory", "device": "device memory", "disk": "disk", "host_kv": "--cpu-max",
                "disk_kv": "--nvme-max"}  # fmt: skip
        for name, what in told.items():
            has, wants = getattr(self, name), getattr(need, name)
            if wants > has:
                return f"{format_size(round(wants))} of {what} and the server has {format_size(max(round(has), 0))}"
        return None


class Planner:
    """What sequences of a length need, for one model and configuration."""

    def __init__(self, model_config: Any, config: RuntimeConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        self._model_config, self._config, self._dtype, self._device = model_config, config, dtype, device

    def need(self, n_tokens: int, budget: str | int | None = None) -> Room:
        """Bytes for one sequence that grows to so many tokens, under a budget of its own; the weights are not in it."""
        config = self._config if budget is None else self._config.with_budget(budget)
        plan = make_plan(self._model_config, config, n_tokens, dtype=self._dtype, device=self._device, limits=Limits())
        pages = {need.where: need.n_bytes for need in plan.needs if need.what == "KV pages"}
        return Room(
            host=plan.total("host"),
            device=0 if plan.device_is_host else plan.total("device"),
            disk=plan.total("disk"),
            host_kv=pages.get("host", 0),
            disk_kv=pages.get("disk", 0),
        )

    def room(self, limits: Limits) -> Room:
        """What is free for sequences, the weights being there already."""
        unbounded = float("inf")

        def free(n_bytes: int | None) -> float:
            return unbounded if n_bytes is None else n_bytes * SHARE

        config = self._config
        cpu_max = config.cpu_max if config.offload == "cpu" else None
        return Room(
            host=free(limits.host),
            device=free(limits.device),
            disk=free(None if limits.disk is None else max(limits.disk - config.nvme_floor, 0)),
            host_kv=unbounded if cpu_max is None else cpu_max,
            disk_kv=unbounded if config.nvme_max is None else config.nvme_max,
        )
