"""What a client is told when a request fails, in OpenAI's shape."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Failure:
    """One line for a client, with its HTTP status; ``retry_after_s`` goes into the header of that name."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None

    def body(self) -> dict[str, Any]:
        """The object that OpenAI's clients read."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


class RequestError(Exception):
    """A request ends with this failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def refuse(message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> RequestError:
    """The request cannot be accepted as it is."""
    return RequestError(Failure(status, message, code=code, param=param))


def server_failure(message: str, *, status: int = 500, code: str | None = None) -> Failure:
    """The request was fine and the server could not serve it."""
    return Failure(status, message, kind="server_error", code=code)


STOPPING = Failure(503, "the server is shutting down", kind="server_error", code="shutting_down", retry_after_s=10)
TIMED_OUT = server_failure("the request did not finish within --request-timeout", status=504, code="timeout")
