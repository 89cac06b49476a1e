"""What loading a model reports while it goes on, and how transformers is kept from reporting by itself."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoadProgress:
    """One step of getting a model ready; ``total`` is None where its size is unknown."""

    step: str
    done: int = 0
    total: int | None = None


OnProgress = Callable[[LoadProgress], None]


def ignore(progress: LoadProgress) -> None:
    """The listener of those who do not listen."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off the library's own bars and warnings; what matters of them is raised as an error instead."""
    import huggingface_hub.utils
    import transformers.utils

    hub_logging: Any = huggingface_hub.utils.logging
    logging: Any = transformers.utils.logging
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def gguf_progress(step: str, on_progress: OnProgress) -> Iterator[None]:
    """Report the tensors of a .gguf file as transformers dequantises them, in place of its bar, which has no switch."""
    import transformers.modeling_gguf_pytorch_utils as reader

    def report(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        listed = list(tensors)
        for done, tensor in enumerate(listed):
            on_progress(LoadProgress(step, done, len(listed)))
            yield tensor

    bar = vars(reader).get("tqdm")
    vars(reader)["tqdm"] = report
    try:
        yield
    finally:
        vars(reader)["tqdm"] = bar
