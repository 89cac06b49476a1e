"""What the routes share: the loaded model, the scheduler, and the way from a request to a job."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kvoffload.config import SamplingConfig
from kvoffload.models.catalog import LoadedModel
from kvoffload.server.errors import refuse
from kvoffload.server.job import Event, Job
from kvoffload.server.metrics import Metrics
from kvoffload.server.prompts import chat_tokens, check_length, completion_tokens
from kvoffload.server.protocol import ChatRequest, CompletionRequest
from kvoffload.server.replies import Reply
from kvoffload.server.room import Planner
from kvoffload.server.scheduler import Scheduler
from kvoffload.server.stored import StoredSessions


@dataclass(frozen=True)
class Options:
    """What a server is told beside the runtime's configuration."""

    model_name: str
    sampling: SamplingConfig
    chat_template: bool = True
    api_key: str | None = None
    is_local: bool = True
    max_body: int = 16 << 20
    body_timeout_s: float = 30.0
    request_timeout_s: float | None = None


class Mailbox:
    """Events of one job, put in by the scheduler's thread and taken out by the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """Any thread may call this; nobody reads what comes after the loop has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def get(self) -> Event:
        return await self._events.get()


@dataclass(frozen=True)
class Accepted:
    """A request that was queued behind ``position`` others."""

    job: Job
    mailbox: Mailbox
    reply: Reply
    position: int


class Service:
    """Belongs to the event loop; only the scheduler has a thread."""

    def __init__(
        self, loaded: LoadedModel, scheduler: Scheduler, planner: Planner, metrics: Metrics, options: Options, *,
        stored: StoredSessions | None = None,
    ) -> None:  # fmt: skip
        self.scheduler, self.metrics, self.options, self._stored = scheduler, metrics, options, stored
        self._planner, self._tokenizer = planner, loaded.tokenizer
        text = loaded.model.config.get_text_config(decoder=True)
        self._context, self._vocabulary = int(text.max_position_embeddings), int(text.vocab_size)
        self._encoding = asyncio.Lock()  # one long prompt is tokenised at a time, beside the loop
        self.started_at = int(time.time())

    async def accept(self, request: ChatRequest | CompletionRequest) -> Accepted:
        """Tokenise and queue; raises RequestError for what cannot be served."""
        self.check_model(request.model)
        chat = isinstance(request, ChatRequest)
        await self._check_session(request.kvoffload.session)
        prompt = await self._tokens(request)
        limit = check_length(
            len(prompt), request.limit, context=self._context, default=self.options.sampling.max_new_tokens
        )
        mailbox, timeout_s = Mailbox(), self.options.request_timeout_s
        job = Job(
            id=("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            prompt=prompt,
            sampling=request.sampling(self.options.sampling, limit),
            need=self._planner.need(len(prompt) + limit, request.kvoffload.budget),
            send=mailbox.put,
            budget=request.kvoffload.budget,
            store_as=request.kvoffload.session,
            with_layers=bool(request.stream) and request.kvoffload.return_layers,
            deadline_s=None if timeout_s is None else time.monotonic() + timeout_s,
        )
        position = self.scheduler.submit(job)
        return Accepted(job, mailbox, Reply(job.id, self.options.model_name, chat, len(prompt)), position)

    def check_model(self, name: str) -> None:
        """Raise RequestError for a model that is not served here."""
        if name != self.options.model_name:
            raise refuse(f"model {name!r} is not served here; this server has {self.options.model_name!r}",
                         param="model", code="model_not_found", status=404)  # fmt: skip

    async def _check_session(self, name: str | None) -> None:
        if name is None:
            return
        if self._stored is None:
            raise refuse("kvoffload.session: this server stores none (--sessions)", param="kvoffload")
        await asyncio.to_thread(self._stored.check, name)

    async def _tokens(self, request: ChatRequest | CompletionRequest) -> list[int]:
        encode: Callable[[], list[int]]
        if isinstance(request, ChatRequest):
            messages = request.messages

            def encode() -> list[int]:
                return chat_tokens(messages, self._tokenizer, use_template=self.options.chat_template)

        else:
            completion = request

            def encode() -> list[int]:
                return completion_tokens(completion, self._tokenizer, vocabulary=self._vocabulary)

        async with self._encoding:
            result: Awaitable[list[int]] = asyncio.to_thread(encode)
            return await result
