"""``kvoffload chat``: a conversation over lines, on one session. What starts with a slash is a command."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from kvoffload_storage.errors import StorageError
from rich.console import Console

from kvoffload.errors import CancelledError, UsageError
from kvoffload.models.catalog import LoadedModel, load_config, load_model, load_tokenizer, pick_dtype
from kvoffload.runtime.command import check_context, check_machine, max_context, settled
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.prompt import follow_up_ids, prompt_ids
from kvoffload.runtime.session import Session
from kvoffload.runtime.session_choice import find_session, open_session
from kvoffload.runtime.terminal import ProgressView, statistics_line
from kvoffload.settings import Settings

HELP = "commands: /save [NAME.kvo], /stats, /budget [BUDGET], /help, /quit; //text says /text; Ctrl-C ends an answer"


def run_chat(settings: Settings, lines: TextIO, out: TextIO, console: Console) -> int:
    """Answer line after line until /quit or the end of input; answers stream to ``out``, the rest goes to the console.
    A session that was given with --session is saved at the end."""
    view = ProgressView(console, quiet=settings.quiet)
    for name in ("prompt", "prompt_file"):
        if getattr(settings, name) is not None:
            raise UsageError(f"{name}: chat takes it line by line")
    settings = settled(settings)
    with view.showing():
        loaded = _load(settings, view)
    with open_session(Runtime(loaded, settings.runtime()), settings, expected_tokens=0) as session:
        if session.token_ids:
            view.say(f"going on behind {len(session.token_ids):,} tokens")
        view.say(HELP)
        Chat(session, settings, loaded, out, view).run(_read(lines, view))
        if session.autosave is not None and session.token_ids:
            session.save(session.autosave)
    return 0


@dataclass(frozen=True)
class Chat:
    """One conversation. Commands that cannot be done say so and change nothing; so does a message that is refused. What
    goes wrong in the middle of an answer ends the conversation."""

    session: Session
    settings: Settings
    loaded: LoadedModel
    out: TextIO
    view: ProgressView

    def run(self, lines: Iterator[str]) -> None:
        for line in lines:
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if not self._obey(*line[1:].partition(" ")[::2]):
                        return
                elif line.strip():
                    self._answer(line.removeprefix("/") if line.startswith("//") else line)
            except UsageError as error:
                self.view.error(str(error))

    def _obey(self, name: str, argument: str) -> bool:
        """Whether the conversation goes on after this command."""
        commands: dict[str, Callable[[str], None]] = {
            "save": self._save, "stats": self._stats, "budget": self._budget, "help": lambda _: self.view.tell(HELP)
        }  # fmt: skip
        if name in ("quit", "exit"):
            return False
        if name not in commands:
            raise UsageError(f"/{name} is no command; {HELP}")
        commands[name](argument.strip())
        return True

    def _answer(self, text: str) -> None:
        prompt = self._tokens(text)
        n_tokens = len(self.session.token_ids) + len(prompt)
        check_context(n_tokens, max_context(self.loaded.config), self.settings, self.view)
        with _ctrl_c(self.session.cancel), self.view.showing():
            try:
                self.session.prefill(prompt, on_progress=self.view.prefill_bar)
            except CancelledError:
                self.view.say("cancelled: the prompt goes on to be read with the next one")
                return
        with _ctrl_c(self.session.cancel):
            self._stream()

    def _stream(self) -> None:
        last = ""
        try:
            for event in self.session.stream(self.settings.sampling()):
                self.out.write(event.text)
                self.out.flush()
                last = event.text or last
        except CancelledError:
            self.view.say("\ncancelled; what was said so far stays")
        self.out.write("" if last.endswith("\n") else "\n")
        self.out.flush()

    def _tokens(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError("the line is not UTF-8 text") from None
        tokenizer, before = self.loaded.tokenizer, self.session.token_ids
        if not before:
            return prompt_ids(text, self.settings, tokenizer)
        return follow_up_ids(text, self.settings, tokenizer, before[-1])

    def _save(self, name: str) -> None:
        saved_as = self.session.saved_as
        known = self.session.autosave or (saved_as.path if saved_as is not None else None)
        path = Path(name) if name else known
        if path is None or path.suffix != ".kvo":
            raise UsageError("/save needs a name that ends in .kvo")
        if not self.session.token_ids:
            raise UsageError("/save: nothing was said yet")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"/save: {str(path.absolute().parent)!r} is not a folder")
        try:
            self.session.save(path)
        except (OSError, StorageError) as error:
            raise UsageError(f"/save: {error}") from error
        self.view.tell(f"saved {path}: {len(self.session.token_ids):,} tokens")

    def _stats(self, _: str) -> None:
        self.view.tell(statistics_line(self.session.stats()))

    def _budget(self, budget: str) -> None:
        if budget:
            self.session.set_budget(budget)
        self.view.tell(f"budget {self.session.config.effective_budget} a step")


def _load(settings: Settings, view: ProgressView) -> LoadedModel:
    """Everything that can be refused is refused before the weights load, the session included."""
    source, device = check_machine(settings, view)
    model_config = load_config(source)
    dtype = pick_dtype(settings.dtype, model_config, device)
    found = find_session(settings, source, model_config, dtype, view)
    if found is not None and found.unfinished:
        raise UsageError(f"session {str(found.path)!r}: a prefill was broken off; let kvoffload generate finish it")
    tokenizer: Any = load_tokenizer(source, view.load)
    return load_model(source, dtype=dtype, device=device, tokenizer=tokenizer, on_progress=view.load)


def _read(lines: TextIO, view: ProgressView) -> Iterator[str]:
    """Lines without their ends; on a terminal with a prompt, editing and history."""
    try:
        if not lines.isatty():
            yield from (line.rstrip("\r\n") for line in lines)
            return
        import readline  # noqa: F401 - input() uses it once it is there

        while True:
            yield input("> ")
    except EOFError:
        view.say("")
    except UnicodeDecodeError as error:
        raise UsageError(f"the input is not UTF-8 text: {error}") from None


@contextmanager
def _ctrl_c(act: Callable[[], None]) -> Iterator[None]:
    """Inside this block Ctrl-C does this instead of raising in the middle of a forward."""
    before = signal.signal(signal.SIGINT, lambda number, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
