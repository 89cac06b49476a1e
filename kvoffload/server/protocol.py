"""The requests of the OpenAI dialect: every field is checked, and what is not supported is refused by name."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from kvoffload.config import SamplingConfig, explain
from kvoffload.server.errors import refuse
from kvoffload.units import Budget

MOST_STOPS = 16
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0)]
SessionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Off = Literal[False] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None
One = Annotated[int, Field(ge=1, le=1)] | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Vendor(_Strict):
    """What only kvoffload has: ``budget`` as in --budget, the name under which the session is stored, and in a stream
    chunks that tell how far the prefill is and what each token's step did in each layer."""

    budget: str | int | None = None
    session: SessionName | None = None
    return_progress: bool = False
    return_layers: bool = False

    @field_validator("budget")
    @classmethod
    def _is_a_budget(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            Budget.parse(value)
        return value


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text"]


class _Request(_Strict):
    """What both endpoints take. Fields that cannot change an answer are accepted; those that would have to and cannot
    are accepted only with the value that changes nothing."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    kvoffload: Vendor = Vendor()
    n: One = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: str | None = None

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most, where the request says so."""
        return self.max_tokens

    def sampling(self, default: SamplingConfig, max_new_tokens: int) -> SamplingConfig:
        """The server's own settings, but for what the request says; a seed never comes from another request."""
        said = {name: getattr(self, name) for name in ("temperature", "top_p", "seed", "stop")}
        if isinstance(said["stop"], list):
            said["stop"] = tuple(said["stop"])
        given = {name: value for name, value in said.items() if value is not None}
        try:
            return SamplingConfig(**(default.model_dump() | given | {"max_new_tokens": max_new_tokens}))
        except ValidationError as error:
            raise refuse(explain(error, type(self).model_fields)) from None


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: ResponseFormat | None = None
    logprobs: Off = None
    store: Off = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionRequest(_Request):
    """POST /v1/completions; one prompt, as text or as token ids."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1, max_length=1)]
    )
    best_of: One = None
    echo: Off = None
    suffix: None = None
    logprobs: None = None

    @property
    def single(self) -> str | list[int]:
        """The prompt, out of its list of one."""
        first = self.prompt[0] if isinstance(self.prompt, list) else self.prompt
        return self.prompt if isinstance(first, int) else first  # type: ignore[return-value]


R = TypeVar("R", bound=_Request)


def parse(kind: type[R], body: bytes) -> R:
    """A request from its body; raises RequestError that names the first refused field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise refuse(f"the body is not JSON: {first['ctx']['error']}", code="invalid_json") from None
        param = ".".join(str(part) for part in first["loc"][:1]) or None
        raise refuse(explain(error, kind.model_fields)[:1000], param=param) from None
