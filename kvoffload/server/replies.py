"""The answers of the OpenAI dialect: whole objects and the chunks of a stream. Plain functions on plain values."""

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from kvoffload.runtime.events import Progress
from kvoffload.runtime.layer_figures import LayerFigures
from kvoffload.server.job import Done

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """How one request's answer is shaped."""

    id: str
    model: str
    chat: bool
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, done: Done) -> dict[str, Any]:
        """An answer that is not streamed."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": done.finish}
        return {**self._head(streamed=False), "choices": [choice], **self.numbers(done), "kvoffload": vendor(done)}

    def first(self) -> list[dict[str, Any]]:
        """The chunks that open a stream."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.chat else []

    def piece(self, text: str, layers: LayerFigures | None = None) -> dict[str, Any]:
        """A chunk of the answer, with what its token did in each layer where that is wanted."""
        figures = {} if layers is None else {"kvoffload": {"layers": asdict(layers)}}
        return {**self._chunk({"content": text} if self.chat else text), **figures}

    def last(self, done: Done) -> dict[str, Any]:
        """The chunk that says why the answer ends, and what it cost."""
        return {**self._chunk({} if self.chat else "", done.finish), "kvoffload": vendor(done)}

    def usage(self, done: Done) -> dict[str, Any]:
        """The chunk of ``stream_options.include_usage``."""
        return {**self._head(streamed=True), "choices": [], **self.numbers(done)}

    def progress(self, event: Progress, cached: int, started_s: float) -> dict[str, Any]:
        """How far the prefill is, in llama.cpp's words."""
        told = {
            "total": self.prompt_tokens,
            "cache": cached,
            "processed": self.prompt_tokens - event.total_tokens + event.done_tokens,
            "time_ms": round((time.monotonic() - started_s) * 1000),
        }
        return {**self._head(streamed=True), "choices": [], "prompt_progress": told}

    def queued(self, position: int) -> dict[str, Any]:
        return {**self._head(streamed=True), "choices": [], "kvoffload": {"queue_position": position}}

    def numbers(self, done: Done) -> dict[str, Any]:
        return {
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": done.new_tokens,
                "total_tokens": self.prompt_tokens + done.new_tokens,
                "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
            }
        }

    def _head(self, *, streamed: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if streamed else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, said: Any, finish: str | None = None) -> dict[str, Any]:
        content = {"delta": said} if self.chat else {"text": said}
        return {
            **self._head(streamed=True),
            "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": finish}],
        }


def vendor(done: Done) -> dict[str, Any]:
    """What the answer cost, as ``kvoffload generate --json`` names it; None where no step had pages to choose from."""
    names = (
        "bytes_read", "decode_bytes_read", "bytes_written", "budget_tokens", "read_tokens_per_step", "read_share",
        "charged_tokens_per_step", "charged_share", "hit_rate", "completion_mass", "resident_bytes", "ttft_s",
        "tpot_ms",
    )  # fmt: skip
    session = {} if done.stored is None else {"session": done.stored.as_dict()}
    return {name: getattr(done.stats, name) for name in names} | session


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
