"""A session: one sequence, its KV in the tiers, and everything needed to go on with it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from kvoffload.attention.prefill import prepare
from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.errors import UsageError
from kvoffload.models.cache import OffloadCache
from kvoffload.models.sampling import Sampler, TextStream
from kvoffload.runtime.stats import Stats, collect


@dataclass(frozen=True)
class Progress:
    """How far a prefill is; ``bytes_moved`` counts what went to and came from the tiers so far."""

    done_tokens: int
    total_tokens: int
    bytes_moved: int


@dataclass(frozen=True)
class StreamEvent:
    """One generated token and the text that became certain with it."""

    text: str
    token: int


class Session:
    """Prefill, then stream or generate, as often as wanted; close it (or use a ``with`` block) to give its KV back.

    The last generated token is not in the KV yet; it goes in with whatever comes next.
    """

    def __init__(self, model: Any, tokenizer: Any, config: RuntimeConfig, *, expected_tokens: int = 0) -> None:
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self.cache = OffloadCache(model.config, config, expected_tokens=expected_tokens)
        self.token_ids: list[int] = []
        self._logits: Tensor | None = None
        self._prompt_tokens = self._new_tokens = 0
        self._ttft_s: float | None = None
        self._started_s = 0.0
        self._step_s = 0.0
        self._n_steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back memory and files; a second call does nothing."""
        self.cache.close()

    @torch.inference_mode()
    def prefill(self, prompt: str | list[int] | Tensor, on_progress: Callable[[Progress], None] | None = None) -> None:
        """Take in a prompt exactly, in chunks; text is tokenised as it is (no chat template). Raises UsageError if
        empty."""
        ids = self._encode(prompt)
        if not ids:
            raise UsageError("the prompt is empty: at least one token is needed")
        self._started_s, self._ttft_s = time.perf_counter(), None
        pending = self.token_ids[self.cache.get_seq_length() :] + ids
        self.token_ids += ids
        self._prompt_tokens += len(ids)
        total = len(pending)
        with self.cache.prefilling():
            done = 0
            for chunk in torch.tensor(pending, device=self._model.device).tensor_split(self._n_chunks(total)):
                self._logits = self._forward(chunk[None])
                done += len(chunk)
                if on_progress is not None:
                    on_progress(Progress(done, total, self._bytes_moved()))
        for layer in self.cache.offloaded:
            prepare(layer)

    @torch.inference_mode()
    def copy_prefill(self, source: "Session") -> None:
        """Begin where another session of the same model stands, under this session's own tier and policies."""
        self.cache.copy_prefill(source.cache)
        self.token_ids, self._logits = list(source.token_ids), source._logits
        self._prompt_tokens = source._prompt_tokens
        for layer in self.cache.offloaded:
            prepare(layer)

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Feed one token under the budget; logits fp32 [vocabulary] of the next one."""
        if self._logits is None:
            raise UsageError("prefill a prompt before the first step")
        if self.cache.get_seq_length() == len(self.token_ids):
            self.token_ids.append(token)
        self._logits = self._forward(torch.tensor([[token]], device=self._model.device))
        return self._logits[0].float()

    def stream(self, sampling: SamplingConfig | None = None) -> Iterator[StreamEvent]:
        """Generate until the end token, a stop string or ``max_new_tokens``; raises UsageError before a prefill."""
        sampling = sampling or SamplingConfig()
        if self._logits is None:
            raise UsageError("prefill a prompt before generating")
        text, sampler = TextStream(self._tokenizer, sampling.stop), Sampler(sampling, self._model.device)
        ends = self._end_tokens()
        for i in range(sampling.max_new_tokens):
            if i:
                started = time.perf_counter()
                self.step(self.token_ids[-1])
                self._step_s += time.perf_counter() - started
                self._n_steps += 1
            token = self._pick(sampler)
            if self._ttft_s is None:
                self._ttft_s = time.perf_counter() - self._started_s
            if token in ends:
                break
            yield StreamEvent(text.push(token), token)
            if text.stopped:
                return
        tail = text.finish()
        if tail:
            yield StreamEvent(tail, self.token_ids[-1])

    def generate(self, sampling: SamplingConfig | None = None) -> str:
        """All of ``stream`` at once."""
        return "".join(event.text for event in self.stream(sampling))

    def stats(self) -> Stats:
        """What moved so far."""
        return collect(
            self.cache.offloaded,
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            ttft_s=self._ttft_s,
            tpot_ms=self._step_s / self._n_steps * 1000 if self._n_steps else None,
        )

    def _encode(self, prompt: str | list[int] | Tensor) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt).input_ids)
        return prompt.flatten().tolist() if isinstance(prompt, Tensor) else list(prompt)

    def _n_chunks(self, n_tokens: int) -> int:
        size = self._config.prefill_chunk or (8192 if self._model.device.type == "cuda" else 1024)
        return -(-n_tokens // size)

    def _forward(self, ids: Tensor) -> Tensor:
        output = self._model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _pick(self, sampler: Sampler) -> int:
        assert self._logits is not None
        token = int(sampler.pick(self._logits, torch.tensor([self.token_ids], device=self._logits.device)))
        self.token_ids.append(token)
        self._new_tokens += 1
        return token

    def _end_tokens(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        own = getattr(self._tokenizer, "eos_token_id", None)
        found = ends if isinstance(ends, list) else [ends]
        return {e for e in [*found, own] if e is not None}

    def _bytes_moved(self) -> int:
        layers = self.cache.offloaded
        moved = [x.fetch.prefill.total() for x in layers] + [x.meter.written for x in layers]
        return sum(m.cpu + m.nvme for m in moved)
