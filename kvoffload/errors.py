"""The errors that users meet; each names the value and what was expected. The cli turns them into exit codes.

KvoffloadError            exit 1
├── UsageError            exit 2: a value, name or combination that cannot be accepted
│   └── UnsupportedModelError  a model whose attention cannot go through the runtime
├── OutOfRoomError        exit 3: memory, disk or a cap is too small for what was asked
└── CancelledError        Session.cancel was called
    └── TimedOutError     a timeout_s that was given has passed
"""


class KvoffloadError(Exception):
    """Anything that the runtime refuses or fails at, told in one line."""

    exit_code = 1


class UsageError(KvoffloadError):
    """A value that was given cannot be accepted."""

    exit_code = 2


class UnsupportedModelError(UsageError):
    """The model cannot be run through the attention interface with equal results."""


class OutOfRoomError(KvoffloadError):
    """What was asked for does not fit into memory, disk or a cap."""

    exit_code = 3


class CancelledError(KvoffloadError):
    """A prefill or a generation was ended between two steps; the session can go on from there."""


class TimedOutError(CancelledError):
    """It was ended by its timeout."""
