"""From logits to the next token, with transformers' own logits processors, and the text of tokens as they come."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvoffload.config import SamplingConfig


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: those of the generation config and the tokenizer's own."""
    ends = model.generation_config.eos_token_id
    own = getattr(tokenizer, "eos_token_id", None)
    found = ends if isinstance(ends, list) else [ends]
    return {e for e in [*found, own] if e is not None}


class Sampler:
    """Greedy at temperature 0, else sampling with a generator of its own."""

    def __init__(self, sampling: SamplingConfig, device: torch.device) -> None:
        self.greedy = sampling.temperature == 0
        self._generator = torch.Generator(device=device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._processors = LogitsProcessorList()
        if not self.greedy:
            self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            self._processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._processors.append(TopPLogitsWarper(sampling.top_p))

    @property
    def state(self) -> Tensor:
        """Where the generator stands, uint8 in host memory; may be set."""
        return self._generator.get_state()

    @state.setter
    def state(self, state: Tensor) -> None:
        self._generator.set_state(state)

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """What ``pick`` draws from."""
        return () if self.greedy else (self._generator,)

    def pick(self, logits: Tensor) -> Tensor:
        """The next token int64 [1, 1] from logits [1, vocabulary], without waiting for the device."""
        if self.greedy:
            return logits.argmax(-1, keepdim=True)
        so_far = torch.zeros(len(logits), 0, dtype=torch.int64, device=logits.device)  # none of these looks at it
        scores: Tensor = self._processors(so_far, logits.float())  # type: ignore[arg-type]
        # what torch.multinomial does, without its checks: the smallest of exponential waiting times comes first
        waits = torch.empty_like(scores).exponential_(1, generator=self._generator)
        return (scores.softmax(-1) / waits).argmax(-1, keepdim=True)


class TextStream:
    """Turns tokens into pieces of text: a piece is held back while its last character is not whole, or while it may
    be the beginning of a stop string. Stop strings are not given out."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._given = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that became certain with this token."""
        self._ids.append(token)
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        found = [at for at in (text.find(s, max(self._given - len(s), 0)) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._give(text, min(found))
        if text.endswith("\ufffd"):
            return ""
        return self._give(text, len(text) - self._held_back(text))

    def finish(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return self._give(text, len(text))

    def _held_back(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stop)), 0)

    def _give(self, text: str, end: int) -> str:
        piece, self._given = text[self._given : end], max(end, self._given)
        return piece
