"""A session: one sequence, its KV in the tiers, and everything needed to go on with it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from kvoffload_storage.bundle_format import Manifest
from kvoffload_storage.errors import IntegrityError
from torch import Tensor

from kvoffload.attention.prefill import prepare
from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.errors import UsageError
from kvoffload.models.batch import Fed
from kvoffload.models.cache import OffloadCache
from kvoffload.models.compiled import glue_of
from kvoffload.models.feed import feed
from kvoffload.models.freeze import frozen_states
from kvoffload.models.parallel import ALONE, Ranks, stage_layers
from kvoffload.models.sampling import Sampler, TextStream, end_tokens
from kvoffload.models.step_graph import Replays
from kvoffload.repeats import capture_of
from kvoffload.runtime.before import Before, going_back, standing
from kvoffload.runtime.chunks import chunk_tokens
from kvoffload.runtime.events import Progress, StreamEvent
from kvoffload.runtime.interrupt import Interrupt
from kvoffload.runtime.ranks import replays, with_rank_budget
from kvoffload.runtime.repair import repair
from kvoffload.runtime.saving import SavedAs, save_session
from kvoffload.runtime.session_file import Description
from kvoffload.runtime.stats import Stats, bytes_moved, collect
from kvoffload.units import Budget


class Session:
    """Prefill, then stream or generate, as often as wanted; close it (or use a ``with`` block) to give its KV back.

    The last generated token is not in the KV yet; it goes in with whatever comes next.
    """

    def __init__(
        self, model: Any, tokenizer: Any, config: RuntimeConfig, *, expected_tokens: int = 0, ranks: Ranks = ALONE
    ) -> None:
        self.model, self._tokenizer, self.config, self.ranks = model, tokenizer, config, ranks
        self.cache = OffloadCache(model.config, config, expected_tokens=expected_tokens, owned=stage_layers(model))
        self.token_ids: list[int] = []
        self.saved_as: SavedAs | None = None
        self.lineage: dict[Path, Manifest] = {}  # where it was read from and saved to, as it was then
        self.before: Before | None = None  # the prompt that comes in
        self.autosave: Path | None = None
        self.sampling: SamplingConfig | None = None
        self.unfinished, self.prompt_start = False, 0
        self.prompt_end: int | None = None  # of the newest prompt, while a command answers it
        self._logits: Tensor | None = None
        self._fed_badly: BaseException | None = None
        self._generator: Tensor | None = None  # where sampling goes on
        self._sampler: Sampler | None = None
        self.prompt_tokens = self._new_tokens = self._n_steps = 0
        self.restored_tokens = self._computed = self.n_repairs = self.recomputed_pages = 0
        self._ttft_s: float | None = None
        self._started_s = self._step_s = 0.0
        self._interrupt = Interrupt(ranks.largest)
        capture = capture_of(model.device) if replays(config, ranks) else None
        self.replays = Replays(model, capture, None if capture is None else glue_of(model, config.compile))
        self._picked: Tensor | int | None = None  # the token that the newest step picked

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back memory and files; a second call does nothing. What was saved stays."""
        self.cache.close()
        if self.saved_as is not None:
            self.saved_as.release()

    def save(self, path: str | Path, *, pinned: bool | None = None, overwrite: bool = False) -> None:
        """Save to a session folder, which is made or brought up to date: it has everything that is needed to go on in
        another process. Pages that were saved before are not written again. Raises UsageError when another process
        writes to it or has saved there since this session was read, and where another session is without ``overwrite``.
        """
        self.cache.check_open()
        self.saved_as = save_session(self, Path(path), pinned=pinned, overwrite=overwrite)

    def cancel(self) -> None:
        """End the prefill or generation that runs, or else the next one, before its next chunk or step: it raises
        CancelledError. Any thread may call this. What was done stays, and the session can go on from there."""
        self._interrupt.cancel()

    def prefill(
        self,
        prompt: str | list[int] | Tensor,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> None:
        """Take in a prompt exactly, in chunks; text is tokenised as it is (no chat template). Raises UsageError if
        empty; TimedOutError at the end of the first chunk that is later than ``timeout_s``, and then
        ``finish_prefill`` goes on."""
        self.begin_prefill(prompt)
        with self._interrupt.within(timeout_s):
            self.finish_prefill(on_progress)

    def begin_prefill(self, prompt: str | list[int] | Tensor) -> None:
        """Note a prompt that ``finish_prefill`` or ``prefill_chunks`` takes in."""
        self.cache.check_open()
        ids = self._encode(prompt)
        if not ids:
            raise UsageError("the prompt is empty: at least one token is needed")
        if not self.unfinished:
            self.before = standing(self)
            self.prompt_start = len(self.token_ids)
        self.token_ids += ids
        self.prompt_tokens += len(ids)
        self.unfinished = True

    def finish_prefill(self, on_progress: Callable[[Progress], None] | None = None) -> None:
        """Take in the rest of a prompt whose prefill was broken off, in this process or another. With ``autosave`` the
        session is saved after every chunk; one that finds no room in files is as before the prompt, if not empty."""
        for progress in self.prefill_chunks():
            if on_progress is not None:
                on_progress(progress)

    def prefill_chunks(self) -> Iterator[Progress]:
        """``finish_prefill`` chunk by chunk: whoever iterates may do something else in between."""
        if not self.unfinished:
            return
        self._started_s, self._ttft_s = time.perf_counter(), None
        with going_back(self):
            while self.unfinished:
                try:
                    yield from self._prefill_rest()
                except IntegrityError as error:
                    with torch.inference_mode():
                        repair(self, error)
            if self.autosave is not None:
                self.save(self.autosave)

    def _prefill_rest(self) -> Iterator[Progress]:
        pending = self.pending
        done, total = 0, len(pending)
        for chunk in torch.tensor(pending, device=self.model.device).tensor_split(self._n_chunks(total)):
            self._interrupt.check()
            self._prefill_chunk(chunk, whole=len(chunk) == total)
            done += len(chunk)
            if done == total:
                self._prepare()
                self.unfinished = False
            yield Progress(done, total, bytes_moved(self.cache.offloaded))
            if self.autosave is not None and done < total:
                self.save(self.autosave)

    @torch.inference_mode()
    def _prefill_chunk(self, chunk: Tensor, *, whole: bool) -> None:
        frozen = frozen_states(self.model, self.cache.freezing, self.cache.get_seq_length())
        with self.cache.prefilling(whole=whole), frozen:
            self._logits = self._forward(chunk[None])

    @torch.inference_mode()
    def _prepare(self) -> None:
        for layer in self.cache.offloaded:
            prepare(layer)

    @torch.inference_mode()
    def copy_prefill(self, source: "Session") -> None:
        """Begin where another session of the same model stands, under this session's own tier and policies."""
        self.cache.copy_prefill(source.cache)
        self.token_ids, self._logits = list(source.token_ids), source._logits
        self.prompt_tokens = source.prompt_tokens
        self._prepare()

    @property
    def pending(self) -> list[int]:
        """The tokens that are not in the KV yet: the newest generated one, or a prompt's rest."""
        return self.token_ids[self.cache.get_seq_length() :]

    def take_fed(self, outcome: Fed | BaseException, took_s: float) -> None:
        """The one pending token was fed from outside in ``took_s``; what went wrong is told, or mended, by this
        session's next step."""
        if isinstance(outcome, BaseException):
            self._fed_badly = outcome
        else:
            self._logits = outcome.logits
            self._picked = outcome.picked if self._sampler is not None and self._sampler.greedy else None
        self._computed, self._n_steps, self._step_s = self._computed + 1, self._n_steps + 1, self._step_s + took_s

    def step(self, token: int) -> Tensor:
        """Feed one token behind all others, under the budget; logits fp32 [vocabulary] of the next one."""
        self._catch_up()
        self.token_ids.append(token)
        return self._catch_up()[0].float()

    def set_budget(self, budget: str | int | Budget) -> None:
        """What steps may read from now on; raises UsageError for what is no budget."""
        self.config = with_rank_budget(self.config, budget, self.ranks)
        self.cache.set_budget(self.config.effective_budget)

    def crop(self, n_tokens: int) -> None:
        """Forget the newest tokens; raises UsageError if they are sealed already (only the recent window can go). The
        token before them is fed anew, for the logits after it."""
        if not 0 < n_tokens < len(self.token_ids):
            raise UsageError(f"cannot crop {n_tokens} of {len(self.token_ids)} tokens: at least one goes and one stays")
        kept = self.token_ids[: len(self.token_ids) - n_tokens]
        self.cache.crop(-(self.cache.get_seq_length() - (len(kept) - 1)))
        self.cache.forget_decoded()
        self.token_ids = kept

    def stream(
        self, sampling: SamplingConfig | None = None, *, timeout_s: float | None = None
    ) -> Iterator[StreamEvent]:
        """Generate until the end token, a stop string or ``max_new_tokens``: one event a token, the end token included.
        Without ``sampling`` (or its seed) it goes on as the last time, also in a restored session. Raises UsageError
        before a prefill, TimedOutError before the first step that begins later than ``timeout_s``."""
        with self._interrupt.within(timeout_s):
            yield from self._stream(sampling)

    def _stream(self, sampling: SamplingConfig | None) -> Iterator[StreamEvent]:
        goes_on = sampling is None or sampling.seed is None
        sampling = self.sampling = sampling or self.sampling or SamplingConfig()
        text = TextStream(self._tokenizer, sampling.stop)
        sampler, state = Sampler(sampling, self.model.device), self._rng()
        if goes_on and state is not None:
            sampler.state = state
        self._sampler = sampler
        if self._computed == 0:
            self._started_s = time.perf_counter()
        self.finish_prefill()
        ends = end_tokens(self.model, self._tokenizer)
        for i in range(sampling.max_new_tokens):
            self._interrupt.check()
            token = self._next_token(sampler)
            if token in ends:
                yield StreamEvent(text.finish(), token, "stop")
                return
            piece = text.push(token)
            if text.stopped:
                yield StreamEvent(piece, token, "stop")
                return
            last = i == sampling.max_new_tokens - 1
            yield StreamEvent(piece + text.finish(), token, "length") if last else StreamEvent(piece, token)

    def generate(self, sampling: SamplingConfig | None = None, *, timeout_s: float | None = None) -> str:
        """All of ``stream`` at once."""
        return "".join(event.text for event in self.stream(sampling, timeout_s=timeout_s))

    def stats(self) -> Stats:
        """What moved so far."""
        return collect(
            self.cache.offloaded,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self._new_tokens,
            ttft_s=self._ttft_s,
            tpot_ms=self._step_s / self._n_steps * 1000 if self._n_steps else None,
            bounded_bytes=self.cache.bounded_bytes,
            copied=(self.cache.copied_read, self.cache.copied_written),
            restored_tokens=self.restored_tokens,
            computed_tokens=self._computed,
            recomputed_pages=self.recomputed_pages,
            max_dropped_mass=self.config.max_dropped_mass,
            graph_steps=self.replays.count,
            compiled=self.replays.compiled,
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """What a session file keeps beside the cache: the logits after the newest token, if it was fed already, and
        where sampling goes on."""
        found = {"logits": self._logits, "rng": self._rng()}
        if self.cache.get_seq_length() < len(self.token_ids):
            del found["logits"]
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items() if tensor is not None}

    def take_over(
        self, token_ids: list[int], saved: Description, tensors: dict[str, Tensor], sampling: SamplingConfig | None
    ) -> None:
        """Stand where a session file stands; the cache is filled already."""
        self.token_ids, self.sampling = token_ids, sampling
        self.prompt_tokens, self.prompt_start = saved.prompt_tokens, saved.prompt_start
        self.prompt_end, self.unfinished = saved.prompt_end, saved.unfinished or self.unfinished
        self.restored_tokens = self.cache.get_seq_length()
        self._generator = tensors.get("rng")
        if "logits" in tensors and not self.unfinished:
            self._logits = tensors["logits"].to(self.model.device)

    def _rng(self) -> Tensor | None:
        return self._generator if self._sampler is None else self._sampler.state

    def _encode(self, prompt: str | list[int] | Tensor) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt).input_ids)
        return prompt.flatten().tolist() if isinstance(prompt, Tensor) else list(prompt)

    def _n_chunks(self, n_tokens: int) -> int:
        size = self.config.prefill_chunk or chunk_tokens(self.model, saved=self.autosave is not None)
        return self.ranks.largest(-(-n_tokens // size))  # devices of ranks need not have the same room

    def _forward(self, ids: Tensor) -> Tensor:
        self._computed += ids.shape[1]
        output = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def _next_token(self, sampler: Sampler) -> int:
        started = time.perf_counter()
        behind = len(self.token_ids) - self.cache.get_seq_length()
        logits = self._catch_up(sampler)
        picked = sampler.pick(logits) if self._picked is None else self._picked
        token, self._picked = self.ranks.first(int(picked)), None
        self._step_s += (time.perf_counter() - started) * (behind > 0)
        self._n_steps += behind
        self.token_ids.append(token)
        self._new_tokens += 1
        if self._ttft_s is None:
            self._ttft_s = time.perf_counter() - self._started_s
        return token

    @torch.inference_mode()
    def _catch_up(self, sampler: Sampler | None = None) -> Tensor:
        """Feed the tokens that are not in the KV yet (the newest generated one, if any); the logits after them all.
        Where the last of these steps picks a token too, it is noted."""
        if self._fed_badly is not None:
            error, self._fed_badly = self._fed_badly, None
            self._recover(error)
        self.cache.check_open()
        pending = self.pending
        for token in pending:
            try:
                self._computed += 1
                stepped = self.replays.step(self.cache, token, sampler) if len(pending) == 1 else None
                if stepped is not None:
                    self._logits, self._picked = stepped.logits.clone(), None if sampler is None else stepped.picked
                    break
                self._logits = feed(self.model, self.cache, torch.tensor([[token]], device=self.model.device))[:, -1]
            except IntegrityError as error:
                self._recover(error)
                break
        if self._logits is None:
            raise UsageError("prefill a prompt first: there is nothing to go on from")
        return self._logits

    def _recover(self, error: BaseException) -> None:
        """After a forward that failed: where a page is to blame, its tokens and those behind them are prefilled."""
        if not isinstance(error, IntegrityError):
            raise error
        repair(self, error)
        ttft_s = self._ttft_s
        self.finish_prefill()
        self._ttft_s = ttft_s
