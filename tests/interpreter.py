"""Launches in Triton's interpreter without two costs that buy nothing: coverage's tracing, since what is interpreted is
no line of the report, and patching the language again for every function that a kernel calls."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def hasten() -> None:
    """For this process; nothing where triton is not installed."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[frozenset[str]] = set()

    def launch_untraced(executor: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        with _untraced():
            launch(executor, *args, **kwargs)

    def patch_once(function: Callable[..., Any]) -> Any:
        languages = frozenset(
            name for name, value in function.__globals__.items() if value in (interpreter.tl, interpreter.tl.core)
        )
        if languages in patched:
            return None
        patched.add(languages)
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_untraced, patch_once


@contextmanager
def _untraced() -> Iterator[None]:
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)
        _a_call()


def _a_call() -> None:
    """Coverage's tracer is at work again from the next call of a function on."""
