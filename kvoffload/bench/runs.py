"""What is measured: our runtime under its configuration and under others, and transformers' caches, each as one step
after another on the same KV."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvoffload.bench.ceilings import StepBytes, read_weight_bytes
from kvoffload.bench.clock import Clock
from kvoffload.bench.imposed import ImposedHits
from kvoffload.bench.prompt_kv import PromptKv
from kvoffload.buffers import tensor_bytes
from kvoffload.config import RuntimeConfig
from kvoffload.models.compiled import Glue, glue_of
from kvoffload.models.feed import feed
from kvoffload.models.self_test import switch_attention
from kvoffload.models.stock import ResidentStep, cache_tensors, stock_attention, stock_cache
from kvoffload.runtime.session import Session
from kvoffload.runtime.stats import Stats, collect
from kvoffload.units import Budget

FULL = Budget.parse("100%")


@dataclass(frozen=True)
class Case:
    """A context of ``n_tokens`` tokens before the first step; ``room`` more may come. ``exactly`` asks for everything
    to be read, for comparisons with dense attention; else ``hit_share``, if given, is imposed on page caches."""

    n_tokens: int
    n_sequences: int
    room: int
    exactly: bool = False
    hit_share: float | None = None


class Run(ABC):
    """A cache with its KV in it, ready to decode."""

    @abstractmethod
    def step(self, ids: Tensor) -> Tensor:
        """Feed int64 [B, 1]; logits [B, vocabulary], valid until the next step."""

    @abstractmethod
    def step_bytes(self, n_steps: int) -> StepBytes:
        """What one of the newest ``n_steps`` steps touched, all sequences together; those are all since the last
        ``start``."""

    @property
    @abstractmethod
    def kv_bytes(self) -> int:
        """Device bytes held for the KV between steps."""

    def start(self) -> None:  # noqa: B027 - most count nothing
        """The steps that count begin now."""

    def told(self) -> dict[str, Any]:
        """What else a report says of the run."""
        return {}


class OurRun(Run):
    """Our runtime's decode path: a session's where there is one sequence, else that of batches."""

    def __init__(self, model: Any, config: RuntimeConfig, kv: PromptKv, case: Case) -> None:
        switch_attention(model)
        self._model = model
        if case.exactly:
            config = config.model_copy(update={"budget": FULL})
        self._tier = config.offload
        self._session = Session(model, None, config, expected_tokens=case.n_tokens + case.room)
        self.cache = self._session.cache
        try:
            self._fill(kv, case)
        except BaseException:
            self.cache.close()
            raise

    @torch.inference_mode()
    def _fill(self, kv: PromptKv, case: Case) -> None:
        """The real tokens by a prefill, the others directly."""
        if case.n_sequences == 1:
            kv.fill_session(self._session, case.n_tokens)
        else:
            with self.cache.prefilling():
                self._model(kv.ids[: case.n_sequences], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            kv.fill(self.cache, case.n_sequences, case.n_tokens)
        if case.hit_share is not None and not case.exactly:
            for layer in self.cache.offloaded:
                layer.chooser = ImposedHits(layer.chooser, case.hit_share)

    def step(self, ids: Tensor) -> Tensor:
        stepped = self._session.replays.step(self.cache, ids)
        return feed(self._model, self.cache, ids)[:, -1] if stepped is None else stepped.logits

    def start(self) -> None:
        self._before = self._moved()

    def step_bytes(self, n_steps: int) -> StepBytes:
        layers = self.cache.offloaded
        slow = self._tier != "none"
        kv = sum(x.budget(x.n_tokens) * x.geometry.slice_bytes * x.geometry.n_sequences for x in layers)
        return StepBytes(
            weights=read_weight_bytes(self._model),
            index=sum(x.selector.index_bytes for x in layers if not x.index_on_host),
            completion=sum(x.completion.state_bytes for x in layers),
            fetched=(self._moved() - self._before) / n_steps + sum(x.index_link_bytes for x in layers),
            kv=0 if slow else kv,
        )

    @property
    def kv_bytes(self) -> int:
        return self._stats().resident_bytes

    def told(self) -> dict[str, Any]:
        stats = self._stats()
        tokens = ("budget_tokens", "read_tokens_per_step", "charged_tokens_per_step")
        told = (*tokens, "hit_rate", "completion_mass", "index_read_share")
        replays = self._session.replays
        refusal = "" if replays.graph is None else replays.graph.refusal
        graph = {"graph_steps": replays.count, "graph_refusal": refusal, "compiled": replays.compiled}
        return {name: getattr(stats, name) for name in told} | {"index_host_bytes": stats.index_host_bytes, **graph}

    def _moved(self) -> int:
        return sum(self._stats().decode_bytes_read.values())

    def _stats(self) -> Stats:
        return collect(self.cache.offloaded, prompt_tokens=0, new_tokens=0, ttft_s=None, tpot_ms=None)


class StockRun(Run):
    """transformers' DynamicCache, eager."""

    def __init__(self, model: Any, kv: PromptKv, case: Case, *, offloading: bool) -> None:
        self._model, self._offloading = model, offloading
        with torch.inference_mode():
            layers = kv.layers(case.n_sequences, case.n_tokens)
            self._cache = stock_cache(model, layers, offloading=offloading)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        output = self._model(ids, past_key_values=self._cache, use_cache=True)
        logits: Tensor = output.logits[:, -1]
        return logits

    def step_bytes(self, n_steps: int) -> StepBytes:
        everything = tensor_bytes(*cache_tensors(self._cache))
        kv, fetched = (0, everything) if self._offloading else (everything, 0)
        return StepBytes(weights=read_weight_bytes(self._model), fetched=fetched, kv=kv)

    @property
    def kv_bytes(self) -> int:
        return tensor_bytes(*(t for t in cache_tensors(self._cache) if t.device == self._model.device))


class DenseRun(Run):
    """Dense attention over KV on the device, the whole step in one CUDA graph where there are graphs; with ``glue`` the
    model's small operations are compiled."""

    def __init__(self, model: Any, kv: PromptKv, case: Case, glue: Glue | None) -> None:
        self._model, self._glue = model, glue
        with torch.inference_mode():
            layers = kv.layers(case.n_sequences, case.n_tokens)
            self._resident = ResidentStep(model, layers, case.n_sequences, glue=glue)
        self._again = Clock(model.device).graph(self._resident)

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        self._resident.ids.copy_(ids)
        self._again()
        assert self._resident.logits is not None
        return self._resident.logits

    def step_bytes(self, n_steps: int) -> StepBytes:
        return StepBytes(weights=read_weight_bytes(self._model), kv=self._resident.kv_bytes)

    @property
    def kv_bytes(self) -> int:
        return self._resident.kv_bytes

    def told(self) -> dict[str, Any]:
        return {"compiled": "" if self._glue is None else self._glue.note}


@dataclass(frozen=True)
class Contender:
    """Something to measure, by name. ``lacks`` says why it cannot be measured here; ``most_steps`` bounds what is slow;
    ``exact_steps`` is how many of its steps equal dense ones (0: it is what others are compared with); ``is_dense``
    says that all KV lies on the device, so that fewer sequences may fit; ``tier`` is where the rest is fetched from."""

    name: str
    open: Callable[[Case], AbstractContextManager[Run]]
    lacks: str = ""
    most_steps: int = 1 << 30
    exact_steps: int = 1 << 30
    is_dense: bool = False
    tier: str = "none"


def ours(name: str, model: Any, config: RuntimeConfig, kv: PromptKv) -> Contender:
    """Our runtime under a configuration."""

    @contextmanager
    def opened(case: Case) -> Iterator[Run]:
        run = OurRun(model, config, kv, case)
        with run.cache:
            yield run

    return Contender(name, opened, is_dense=config.offload == "none", tier=config.offload)


def dense(model: Any, config: RuntimeConfig, kv: PromptKv) -> Contender:
    """Dense attention captured in a CUDA graph, the rest of the model compiled where ours would be."""
    glue = glue_of(model, config.compile)

    @contextmanager
    def opened(case: Case) -> Iterator[Run]:
        yield DenseRun(model, kv, case, glue)

    return Contender("dense", opened, exact_steps=1, is_dense=True)


def stock(name: str, model: Any, kv: PromptKv, *, offloading: bool, eager: bool = False) -> Contender:
    """transformers' DynamicCache, on the device or offloaded, with its fused attention or the eager one."""

    @contextmanager
    def opened(case: Case) -> Iterator[Run]:
        with stock_attention(model, eager=eager):
            yield StockRun(model, kv, case, offloading=offloading)

    on_gpu = model.device.type == "cuda"
    lacks = "" if on_gpu or not offloading else "DynamicCache(offloading=True) needs a CUDA device"
    most = 3 if offloading else 16
    return Contender(
        name, opened, lacks, most, exact_steps=0, is_dense=not offloading, tier="cpu" if offloading else "none"
    )


PEERS = {
    "dense": "dense attention on the device, one CUDA graph a step, compiled as ours is",
    "dynamic": "transformers' DynamicCache",
    "offloaded": "transformers' DynamicCache(offloading=True)",
    "selection": "ours, selection alone",
    "ahead": "ours with --look-ahead",
    "resident": "ours with --offload none",
}


def peers(names: tuple[str, ...], model: Any, config: RuntimeConfig, kv: PromptKv) -> list[Contender]:
    """The named peers of ``config``, in order."""
    made: dict[str, Callable[[], Contender]] = {
        "dense": lambda: dense(model, config, kv),
        "dynamic": lambda: stock("dynamic", model, kv, offloading=False),
        "offloaded": lambda: stock("offloaded", model, kv, offloading=True),
        "selection": lambda: ours("selection", model, selection_only(config), kv),
        "ahead": lambda: ours("ahead", model, _changed(config, look_ahead=True), kv),
        "resident": lambda: ours("resident", model, on_device(config), kv),
    }
    return [made[name]() for name in names]


def selection_only(config: RuntimeConfig) -> RuntimeConfig:
    """The same without a completion."""
    return _changed(config, completion="none", gate=False, gate_recheck=None, max_dropped_mass=None)


def on_device(config: RuntimeConfig) -> RuntimeConfig:
    """The same with all KV on the device and all of it read."""
    return _changed(
        config, offload="none", budget=FULL, gpu_cache=None, prefetch=0.0, fetch="wait", cpu_max=None, look_ahead=False
    )


def _changed(config: RuntimeConfig, **fields: Any) -> RuntimeConfig:
    kept = {name: getattr(config, name) for name in RuntimeConfig.model_fields}
    return RuntimeConfig(**(kept | fields))
