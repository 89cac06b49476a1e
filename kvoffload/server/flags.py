"""The flags that only ``kvoffload serve`` has."""

from pathlib import Path
from typing import Annotated

from kvoffload.flags import flag

Host = Annotated[str | None, flag("--host", help="Address to listen on.", default="127.0.0.1")]
Port = Annotated[int | None, flag("--port", help="Port; 0 takes a free one.", default="8000")]
ApiKey = Annotated[
    str | None,
    flag("--api-key", help="Key that every request but /health must carry; better given as KVOFFLOAD_API_KEY, which "
         "other users do not see.", default="none"),
]  # fmt: skip
MaxRunning = Annotated[int | None, flag("--max-running", help="Requests that run at once, if they fit.", default="64")]
MaxQueue = Annotated[
    int | None, flag("--max-queue", help="Requests that wait; further ones are told to come back.", default="64")
]
MaxBody = Annotated[str | None, flag("--max-body", help="Largest request body.", default="16MiB")]
BodyTimeout = Annotated[
    float | None,
    flag("--body-timeout", help="Seconds a request may take to arrive, and an answer may go unread.", default="30"),
]
RequestTimeout = Annotated[
    float | None, flag("--request-timeout", help="Seconds a request may take, queue included.", default="no limit")
]
Grace = Annotated[
    float | None, flag("--grace", help="Seconds that running requests may go on at shutdown.", default="10")
]
Sessions = Annotated[
    Path | None,
    flag("--sessions", help="Folder of stored sessions: requests name theirs, and any prompt that begins like one "
         "reads its pages.", default="none are stored"),
]  # fmt: skip
KeepSessions = Annotated[
    int | None,
    flag("--keep-sessions", help="Finished conversations whose KV is kept for a prompt that begins like one.",
         default="4"),
]  # fmt: skip
