"""What a context needs and whether it fits, worked out from a model's config before anything is allocated.

``make_plan`` is arithmetic on its arguments; ``limits.find_limits`` asks the machine.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from kvoffload.cache.slots import key_room
from kvoffload.config import RuntimeConfig
from kvoffload.errors import OutOfRoomError
from kvoffload.models.parallel import ALONE, Ranks
from kvoffload.runtime.limits import Limits
from kvoffload.runtime.ranks import replays
from kvoffload.units import format_size

Where = Literal["device", "host", "disk"]
_BLOCK = 4096
_EXTENT_BYTES = 1 << 20
_IN_FLIGHT_BYTES = 64 << 20
_WINDOW_FIELD = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_ADVICE = {
    "device": "use --offload cpu or nvme, --index cpu, a smaller --gpu-cache or a shorter context",
    "host": "use --offload nvme, a shorter context or a smaller model",
    "disk": "give --nvme-dir on a larger disk, or shorten the context",
}


@dataclass(frozen=True)
class KVFootprint:
    """The KV of one sequence: layers that grow with the context, and windows of those that do not."""

    n_layers: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    itemsize: int
    windows: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> "KVFootprint":
        """From a transformers config, without weights."""
        text = config.get_text_config(decoder=True)
        windows = _layer_windows(text)
        n_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        key_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if getattr(text, "kv_lora_rank", None):  # multi-head latent attention, as the attention function sees it
            key_dim = text.qk_nope_head_dim + text.qk_rope_head_dim
        return cls(
            n_layers=windows.count(None),
            n_kv_heads=n_heads,
            key_dim=key_dim,
            value_dim=getattr(text, "v_head_dim", None) or key_dim,
            itemsize=dtype.itemsize,
            windows=tuple(window for window in windows if window is not None),
        )

    def of_rank(self, ranks: Ranks) -> "KVFootprint":
        """What the rank with most layers keeps of it."""
        n_layers = self.n_layers - (ranks.pp_size - 1) * (self.n_layers // ranks.pp_size)
        return replace(self, n_layers=n_layers, n_kv_heads=self.n_kv_heads // ranks.tp_size)

    @property
    def token_bytes(self) -> int:
        """One token-equivalent: K and V of one token, layer and kv head."""
        return (self.key_dim + self.value_dim) * self.itemsize

    @property
    def bytes_per_token(self) -> int:
        """What every further token adds, over all layers that grow."""
        return self.n_layers * self.n_kv_heads * self.token_bytes

    def window_bytes(self, context: int) -> int:
        """KV of the layers that keep only a window."""
        return sum(min(window, context) for window in self.windows) * self.n_kv_heads * self.token_bytes


@dataclass(frozen=True)
class Need:
    """Bytes that something takes somewhere; ``cap`` is a limit set by the user, ``flag`` what set it."""

    what: str
    where: Where
    n_bytes: int
    cap: int | None = None
    flag: str = ""


@dataclass(frozen=True)
class Plan:
    """What is needed where. ``device_is_host`` says that device memory is host memory (a CPU device), ``replays_steps``
    that decode steps will be replays of a captured graph, if those of the model can be."""

    context: int
    batch: int
    offload: str
    budget_tokens: float
    footprint: KVFootprint
    needs: tuple[Need, ...]
    limits: Limits
    device_is_host: bool
    replays_steps: bool = False

    @property
    def kv_bytes(self) -> int:
        """The KV that grows with the context, of all sequences."""
        return self.footprint.bytes_per_token * self.context * self.batch

    def total(self, where: Where) -> int:
        """Bytes needed there; on a CPU device everything of the device counts as host memory."""
        counted = {"host", "device"} if where == "host" and self.device_is_host else {where}
        return sum(need.n_bytes for need in self.needs if need.where in counted)

    def available(self, where: Where) -> int | None:
        return {"device": self.limits.device, "host": self.limits.host, "disk": self.limits.disk}[where]

    def problem(self) -> str | None:
        """One line on the first thing that does not fit, with what helps; None when everything fits."""
        for need in self.needs:
            if need.cap is not None and need.n_bytes > need.cap:
                return (
                    f"{need.what} of {self._tokens()} take {format_size(need.n_bytes)} and {need.flag} allows "
                    f"{format_size(need.cap)}: raise it or shorten the context"
                )
        for where in self._pools():
            free, total = self.available(where), self.total(where)
            if free is not None and total > free:
                name = "disk" if where == "disk" else f"{where} memory"
                needed = f"{format_size(total)} of {name}" + ("" if where == "disk" else ", weights included,")
                return f"{self._tokens()} need {needed} and {format_size(free)} is free: {_ADVICE[where]}"
        return None

    def check(self) -> None:
        """Raise OutOfRoomError if anything does not fit."""
        if problem := self.problem():
            raise OutOfRoomError(problem)

    def rows(self) -> list[tuple[str, str, str]]:
        """What, where and how much, for a table; totals last."""
        rows = [(need.what, self._place(need.where), format_size(need.n_bytes)) for need in self.needs if need.n_bytes]
        for where in self._pools():
            free = self.available(where)
            told = "free space unknown" if free is None else f"{format_size(free)} free"
            rows.append(("total", self._place(where), f"{format_size(self.total(where))} of {told}"))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "context": self.context,
            "batch": self.batch,
            "offload": self.offload,
            "bytes_per_token": self.footprint.bytes_per_token,
            "token_equivalent_bytes": self.footprint.token_bytes,
            "kv_bytes": self.kv_bytes,
            "budget_tokens": self.budget_tokens,
            "replays_steps": self.replays_steps,
            "needs": [{"what": n.what, "where": self._place(n.where), "bytes": n.n_bytes} for n in self.needs],
            "total_bytes": {where: self.total(where) for where in self._pools()},
            "free_bytes": {where: self.available(where) for where in self._pools()},
            "locked_memory_limit": self.limits.locked,
            "problem": self.problem(),
        }

    def _pools(self) -> tuple[Where, ...]:
        memory: tuple[Where, ...] = ("host",) if self.device_is_host else ("device", "host")
        return (*memory, "disk") if any(need.where == "disk" for need in self.needs) else memory

    def _place(self, where: Where) -> str:
        return "host" if where == "device" and self.device_is_host else where

    def _tokens(self) -> str:
        return f"{self.context:,} tokens" + (f" x {self.batch}" if self.batch > 1 else "")


def make_plan(
    model_config: Any,
    config: RuntimeConfig,
    context: int,
    batch: int = 1,
    *,
    dtype: torch.dtype,
    device: torch.device,
    limits: Limits,
    weight_bytes: int = 0,
    ranks: Ranks = ALONE,
) -> Plan:
    """The plan for ``batch`` sequences of ``context`` tokens, new ones included; of several ranks, one's part of it
    beside those on the same host."""
    footprint = KVFootprint.of(model_config, dtype).of_rank(ranks)
    n_heads = footprint.n_layers * footprint.n_kv_heads
    budget = config.effective_budget.tokens(context, token_bytes=footprint.token_bytes, n_heads_total=max(n_heads, 1))
    budget = min(budget, context)
    return Plan(
        context=context,
        batch=batch,
        offload=config.offload,
        budget_tokens=budget,
        footprint=footprint,
        needs=(
            Need("weights", "device", weight_bytes // ranks.count),
            *_device_needs(footprint, config, context, batch, budget),
            *_page_needs(footprint, config, context, batch),
        ),
        limits=limits.shared(ranks.on_host),
        device_is_host=device.type == "cpu",
        replays_steps=device.type == "cuda" and replays(config, ranks),
    )


def _device_needs(kv: KVFootprint, config: RuntimeConfig, context: int, batch: int, budget: float) -> tuple[Need, ...]:
    rows = kv.n_layers * kv.n_kv_heads * batch
    sizes = (context, kv.key_dim, kv.value_dim, config.page_size, kv.itemsize)
    anchors = config.sinks + _round_up(config.recent, config.page_size) + config.page_size
    index_place: Where = "host" if config.index == "cpu" or config.selector.reads_slow_tier else "device"
    states = sum(completion.resident_bytes(*sizes) for completion in config.completion)
    cache, largest = config.gpu_cache, min(budget * config.largest_share, context)
    n_stagings = 2 if config.look_ahead else 1  # that the layers share
    return (
        Need("KV of sliding-window layers", "device", kv.window_bytes(context) * batch),
        Need("anchors (sinks and recent window)", "device", anchors * kv.token_bytes * rows),
        Need(f"index ({config.selector.kind})", index_place, config.selector.index_bytes(*sizes) * rows),
        Need(f"completion ({'+'.join(c.kind for c in config.completion)})", "device", states * rows),
        Need("pages of a step", "device", round(largest * kv.token_bytes) * kv.n_kv_heads * batch * n_stagings),
        Need("page cache", "device", 0 if cache is None else cache + _lookup_bytes(kv, config, context, batch)),
    )


def _lookup_bytes(kv: KVFootprint, config: RuntimeConfig, context: int, batch: int) -> int:
    """What finds a slice in the page cache: four bytes for each there may be, on the host where selections go there."""
    n_slices = -(-context // config.page_size) * kv.n_kv_heads * batch
    return 0 if config.offload == "nvme" else 4 * kv.n_layers * key_room(n_slices)


def _page_needs(kv: KVFootprint, config: RuntimeConfig, context: int, batch: int) -> tuple[Need, ...]:
    """The KV itself, page by page, in the tier that was asked for."""
    n_pages = -(-context // config.page_size) * kv.n_layers
    page_bytes = config.page_size * kv.token_bytes * kv.n_kv_heads * batch
    if config.offload == "none":
        return (Need("KV pages", "device", n_pages * page_bytes),)
    if config.offload == "cpu":
        return (Need("KV pages", "host", n_pages * page_bytes, config.cpu_max, "--cpu-max"),)
    disk_bytes = n_pages * _round_up(page_bytes, _BLOCK)
    extents = max(_EXTENT_BYTES, _round_up(page_bytes, _BLOCK)) * kv.n_layers
    return (
        Need("write-behind extents", "host", min(extents + _IN_FLIGHT_BYTES, disk_bytes + extents)),
        *([] if config.cpu_max is None else [Need("cpu tier", "host", min(config.cpu_max, disk_bytes))]),
        Need("KV pages", "disk", disk_bytes, config.nvme_max, "--nvme-max"),
    )


def _layer_windows(text: Any) -> list[int | None]:
    """For every layer that keeps KV: its window, or None if its KV grows with the context."""
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        bounded = next((kind for kind, name in _WINDOW_FIELD.items() if getattr(text, name, None)), "full_attention")
        kinds = [bounded] * text.num_hidden_layers
    kept = [kind for kind in kinds if kind == "full_attention" or kind in _WINDOW_FIELD]
    return [getattr(text, _WINDOW_FIELD[kind]) if kind in _WINDOW_FIELD else None for kind in kept]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
