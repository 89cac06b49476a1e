"""What a session moved, in bytes and in token-equivalents (ARCHITECTURE.md, "The meter")."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from kvoffload_storage.store import Moved

from kvoffload.attention.layer import LayerCache
from kvoffload.cache.slots import Staging


@dataclass(frozen=True)
class Stats:
    """Means over decode steps, layers and kv heads; shares are of the mean context length. ``disk_wait_ms`` is the part
    of a step that waited for files, all layers together; ``late_share`` of the slices asked for were not waited for.
    ``graph_steps`` of the steps were replays of a captured graph; ``compiled`` says what of the model is compiled in
    them. ``dropped_mass_capped`` of all kv heads and steps ended at ``dropped_mass_cap`` above their target;
    ``clamped_entries`` of completions have another key than the exact one. None where no step was made."""

    prompt_tokens: int
    new_tokens: int
    ttft_s: float | None
    tpot_ms: float | None
    budget_tokens: float | None
    read_tokens_per_step: float | None
    read_share: float | None
    charged_tokens_per_step: float | None
    charged_share: float | None
    bytes_read: dict[str, int]
    decode_bytes_read: dict[str, int]
    refresh_bytes_read: dict[str, int]
    bytes_written: dict[str, int]
    resident_bytes: int
    index_host_bytes: int
    completion_mass: float | None
    hit_rate: float | None
    gate_abstain_share: float | None
    restored_tokens: int = 0
    computed_tokens: int = 0
    recomputed_pages: int = 0
    disk_wait_ms: float | None = None
    late_share: float | None = None
    scored_share: float | None = None
    max_dropped_mass: float | None = None
    dropped_mass: float | None = None
    dropped_mass_held: float | None = None
    dropped_mass_capped: float | None = None
    clamped_entries: int = 0
    index_read_share: float | None = None
    graph_steps: int = 0
    compiled: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Reads:
    """Token-equivalents of the decode steps of all layers."""

    read: float
    charged: float
    context: float

    @staticmethod
    def of(layers: Sequence[LayerCache]) -> "Reads | None":
        """Per step, layer and kv head; None before the first step with pages."""
        for layer in layers:
            layer.fetch.count_unasked()
        n_steps = sum(layer.meter.steps for layer in layers)
        if n_steps == 0:
            return None
        read = charged = 0.0
        for layer in layers:
            moved = layer.fetch.decode.total() + layer.fetch.refresh.total()
            n_read = moved.cpu + moved.nvme + layer.meter.index_bytes_read
            unit = layer.geometry.rows * layer.geometry.token_bytes
            read += n_read / unit
            charged += (n_read + layer.meter.state_bytes_touched) / unit
        context = sum(layer.meter.context_tokens for layer in layers)
        return Reads(read / n_steps, charged / n_steps, context / n_steps)


@dataclass(frozen=True)
class Audited:
    """The dropped mass of the audited steps: its mean over steps, layers and query heads, and the share of them in
    which it was at most the target (None without a target)."""

    mean: float
    held: float | None

    @staticmethod
    def of(layers: Sequence[LayerCache], target: float | None) -> "Audited | None":
        """None before the first audited step."""
        dropped = [mass.flatten() for layer in layers for mass in layer.meter.dropped]
        if not dropped:
            return None
        masses = torch.cat(dropped)
        return Audited(float(masses.mean()), None if target is None else float((masses <= target).float().mean()))


def bytes_moved(layers: Sequence[LayerCache]) -> int:
    """What prefills read and everything that was written so far."""
    moved = [layer.fetch.prefill.total() for layer in layers] + [layer.meter.written for layer in layers]
    return sum(m.cpu + m.nvme for m in moved)


def scored_share(layers: Sequence[LayerCache]) -> float | None:
    """Kv heads and steps that scored their pages, as a share of all; None before the first step with pages."""
    n_steps = sum(layer.meter.steps * layer.geometry.rows for layer in layers)
    return sum(layer.meter.scored_rows for layer in layers) / n_steps if n_steps else None


def capped_share(layers: Sequence[LayerCache]) -> float | None:
    """Kv heads and steps that ended at the cap above their target for the dropped mass, as a share of all."""
    n_steps = sum(layer.meter.steps * layer.geometry.rows for layer in layers)
    return sum(layer.reading.n_capped for layer in layers) / n_steps if n_steps else None


def index_read_share(layers: Sequence[LayerCache]) -> float | None:
    """What the newest step read of a streamed index, as a share of the KV; None where the device has the index, or the
    host scores it."""
    n_bytes = sum(layer.index_link_bytes for layer in layers)
    kv = sum(layer.n_tokens * layer.geometry.rows * layer.geometry.token_bytes for layer in layers)
    return n_bytes / kv if n_bytes else None


def collect(
    layers: Sequence[LayerCache],
    *,
    prompt_tokens: int,
    new_tokens: int,
    ttft_s: float | None,
    tpot_ms: float | None,
    bounded_bytes: int = 0,
    copied: tuple[Moved, Moved] = (Moved(), Moved()),
    restored_tokens: int = 0,
    computed_tokens: int = 0,
    recomputed_pages: int = 0,
    max_dropped_mass: float | None = None,
    graph_steps: int = 0,
    compiled: str = "",
) -> Stats:
    """Ask the layers; waits for the device once. ``bounded_bytes`` are those of layers outside the tiers, ``copied``
    what was read and written between tiers for a session file."""
    staged: dict[Staging, int] = {}
    for layer in layers:
        staged[layer.fetch.slots.staging] = max(layer.fetch.step_bytes, staged.get(layer.fetch.slots.staging, 0))
    reads = Reads.of(layers)
    n_steps = max((layer.meter.steps for layer in layers), default=0)
    decode = sum((layer.fetch.decode.total() for layer in layers), Moved())
    index_read = sum(layer.meter.index_bytes_read for layer in layers)
    decode += Moved(cpu=index_read)
    refresh = sum((layer.fetch.refresh.total() for layer in layers), Moved())
    read = sum((layer.fetch.prefill.total() for layer in layers), decode + refresh + copied[0])
    written = sum((layer.meter.written for layer in layers), copied[1])
    n_asked = sum(layer.fetch.n_asked for layer in layers)
    masses = [float(x.meter.completion_mass) / x.meter.steps for x in layers if x.meter.completion_mass is not None]
    chosen = [layer.gate.choice for layer in layers if layer.gate is not None and layer.gate.choice is not None]
    audited = Audited.of(layers, max_dropped_mass)
    return Stats(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        restored_tokens=restored_tokens,
        computed_tokens=computed_tokens,
        recomputed_pages=recomputed_pages,
        ttft_s=ttft_s,
        tpot_ms=tpot_ms,
        budget_tokens=layers[0].budget.tokens(layers[0].n_tokens) if layers else None,
        read_tokens_per_step=reads.read if reads else None,
        read_share=reads.read / reads.context if reads else None,
        charged_tokens_per_step=reads.charged if reads else None,
        charged_share=reads.charged / reads.context if reads else None,
        bytes_read={"cpu": read.cpu, "nvme": read.nvme},
        decode_bytes_read={"cpu": decode.cpu, "nvme": decode.nvme},
        refresh_bytes_read={"cpu": refresh.cpu, "nvme": refresh.nvme},
        bytes_written={"cpu": written.cpu, "nvme": written.nvme},
        resident_bytes=sum(x.resident_bytes for x in layers) + sum(staged.values()) + bounded_bytes,
        index_host_bytes=sum(layer.index_host_bytes for layer in layers),
        index_read_share=index_read_share(layers),
        completion_mass=sum(masses) / len(masses) if masses else None,
        hit_rate=sum(int(layer.fetch.n_hits) for layer in layers) / n_asked if n_asked else None,
        disk_wait_ms=sum(layer.fetch.wait_s for layer in layers) / n_steps * 1000 if n_steps else None,
        late_share=sum(layer.fetch.n_late for layer in layers) / n_asked if n_asked else None,
        gate_abstain_share=sum(float((c == 0).float().mean()) for c in chosen) / len(chosen) if chosen else None,
        scored_share=scored_share(layers),
        max_dropped_mass=max_dropped_mass,
        graph_steps=graph_steps,
        compiled=compiled,
        dropped_mass=audited.mean if audited else None,
        dropped_mass_held=audited.held if audited else None,
        dropped_mass_capped=None if max_dropped_mass is None else capped_share(layers),
        clamped_entries=sum(layer.completion.n_clamped for layer in layers),
    )
