"""Time and memory of a prefill: ours, everything it writes and summarises included, and the library's dense one."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvoffload.bench.begin import Bench
from kvoffload.bench.clock import Timing
from kvoffload.bench.gate import compare, distance
from kvoffload.bench.kernels import Kernel, kernel_table, kernels_of
from kvoffload.bench.output import Table
from kvoffload.models.stock import prefill_stock
from kvoffload.runtime.plan import KVFootprint
from kvoffload.units import format_size

_EAGER_TOKENS = 2048


@dataclass(frozen=True)
class Prefilled:
    """One way to take in a prompt: timed runs, the first one by itself (it allocates and compiles), and the most device
    bytes over those of the weights."""

    name: str
    first_s: float
    time: Timing
    floor_s: float
    over_weights_bytes: int | None
    chunks: int = 1
    kernels: tuple[Kernel, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "first_s": round(self.first_s, 4), "runs": len(self.time.seconds), "seconds": round(self.time.median, 4),
            "floor_s": round(self.floor_s, 4), "ratio_to_floor": round(self.time.median / self.floor_s, 3),
            "device_bytes_over_weights": self.over_weights_bytes, "chunks": self.chunks,
            "kernels": [vars(kernel) for kernel in self.kernels],
        }  # fmt: skip


class PrefillBench:
    """Random tokens through both; what each gives for the next token is compared before any of it counts."""

    def __init__(self, bench: Bench, context: int, n_runs: int, n_kernels: int = 0) -> None:
        self._bench, self._context, self._n_runs, self._n_kernels = bench, context, n_runs, n_kernels
        draws = torch.randint(bench.vocabulary, (1, context), generator=torch.Generator().manual_seed(0))
        self._ids = draws.to(bench.clock.device)
        self._tokens = draws[0].tolist()
        self.floor_s = prefill_flops(bench.loaded.model, context) / (bench.ceilings.gemm_tflop_s * 1e12)

    def ours(self) -> Tensor:
        """Take the prompt in as a session does; the logits after it [1, vocabulary]."""
        with self._bench.runtime.session(expected_tokens=self._context) as session:
            session.begin_prefill(self._tokens)
            self.n_chunks = sum(1 for _ in session.prefill_chunks())
            for store in session.cache.stores:
                store.flush()
            self._bench.clock.settle()
            return session.state_tensors()["logits"]

    def stock(self) -> Tensor:
        """The same by transformers' attention into its DynamicCache."""
        return prefill_stock(self._bench.loaded.model, self._ids)[0].cpu()

    def gate(self) -> tuple[float, float, float]:
        """The first runs: seconds of ours and of the library's, and how far their logits are apart, relatively; raises
        GateError where that is too far."""
        (ours, ours_s), (stock, stock_s) = self._first(self.ours), self._first(self.stock)
        return ours_s, stock_s, compare("prefill", ours[None], stock[None], self._rounding())

    def _rounding(self) -> float:
        """How far the library's own attentions are apart, on as much of the prompt as the eager one has memory for."""
        model, ids = self._bench.loaded.model, self._ids[:, :_EAGER_TOKENS]
        fused, eager = (prefill_stock(model, ids, eager=eager)[0][None] for eager in (False, True))
        return distance(eager, fused)

    def measure(self, name: str, run: Callable[[], object], first_s: float) -> Prefilled:
        """Time the runs that follow the first one."""
        clock = self._bench.clock
        clock.give_back()
        clock.start_peak()
        time = clock.wall(run, self._n_runs)
        peak, weights = clock.peak_bytes(), sum(p.nbytes for p in self._bench.loaded.model.parameters())
        over, chunks = None if peak is None else peak - weights, self.n_chunks if name == "ours" else 1
        return Prefilled(name, first_s, time, self.floor_s, over, chunks, kernels_of(run, clock, self._n_kernels))

    def _first(self, run: Callable[[], Tensor]) -> tuple[Tensor, float]:
        started = self._bench.clock.settle()
        logits = run()
        return logits, self._bench.clock.settle() - started


def prefill_flops(model: Any, n_tokens: int) -> float:
    """Floating-point operations that ``n_tokens`` of one sequence need: every weight matrix but the output's on each,
    and causal attention."""
    embeddings = {id(model.get_input_embeddings().weight)}
    with suppress(AttributeError):
        embeddings.add(id(model.get_output_embeddings().weight))
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in embeddings)
    text = model.config.get_text_config(decoder=True)
    kv = KVFootprint.of(text, model.dtype)
    pairs = kv.n_layers * n_tokens**2 / 2 + sum(min(window, n_tokens) * n_tokens for window in kv.windows)
    flops: float = 2.0 * weights * n_tokens + 2.0 * text.num_attention_heads * (kv.key_dim + kv.value_dim) * pairs
    return flops


def prefill_values(bench: Bench, context: int, error: float, runs: list[Prefilled]) -> dict[str, Any]:
    """The figures for machines; ``runs`` has ours first. ``layer_kv_bytes`` is the KV of one layer."""
    kv = KVFootprint.of(bench.loaded.config, bench.loaded.model.dtype)
    return {
        "bench": "prefill", "model": bench.loaded.name, "context": context, "ceilings": bench.ceilings.as_dict(),
        "gate": error, "runs": {run.name: run.as_dict() for run in runs},
        "ratio_to_stock": round(runs[0].time.median / runs[1].time.median, 4) if runs[1:] else None,
        "layer_kv_bytes": kv.n_kv_heads * kv.token_bytes * context,
        "config": bench.runtime.config.model_dump(mode="json"),
    }  # fmt: skip


def prefill_tables(bench: Bench, context: int, runs: list[Prefilled]) -> list[Table]:
    """The figures for people."""
    rows = [
        (run.name, str(run.chunks), f"{run.first_s:.3f}", f"{run.time.median:.3f}",
         f"{run.time.median / run.floor_s:.2f}",
         "-" if run.over_weights_bytes is None else format_size(run.over_weights_bytes))
        for run in runs
    ]  # fmt: skip
    header = ("what", "chunks", "first s", "s", "x floor", "over the weights")
    kernels = [kernel_table(f"a prefill: {run.name}", run.kernels) for run in runs if run.kernels]
    return [Table(f"{bench.loaded.name}: prefill of {context:,} tokens", header, rows), *kernels]
