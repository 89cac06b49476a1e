"""From what the user gave to the tokens of the prompt."""

import sys
from pathlib import Path
from typing import Any

from kvoffload.errors import UsageError
from kvoffload.settings import Settings


def prompt_text(settings: Settings, *, optional: bool = False) -> str:
    """The file's text, a blank line, then ``-p``; raises UsageError when there is nothing, unless that is allowed."""
    parts = [_read(settings.prompt_file)] if settings.prompt_file else []
    if settings.prompt:
        parts.append(settings.prompt)
    text = "\n\n".join(part.rstrip("\n") for part in parts)
    if not text.strip() and not (optional and not parts):
        raise UsageError("the prompt is empty: give -p TEXT, --prompt-file FILE (- is stdin), or both")
    return text


def prompt_ids(text: str, settings: Settings, tokenizer: Any) -> list[int]:
    """Tokens of the prompt, through the chat template where there is one and it is wanted."""
    if settings.chat_template and getattr(tokenizer, "chat_template", None):
        system = [{"role": "system", "content": settings.system}] if settings.system else []
        messages = [*system, {"role": "user", "content": text}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    plain = f"{settings.system}\n\n{text}" if settings.system else text
    return list(tokenizer(plain, verbose=False).input_ids)


def follow_up_ids(text: str, settings: Settings, tokenizer: Any, last_token: int) -> list[int]:
    """Tokens of a prompt that follows an answer whose newest token is ``last_token``: what the chat template puts
    behind an answer, then the next message. Without a template, the text alone."""
    if not (settings.chat_template and getattr(tokenizer, "chat_template", None)):
        return list(tokenizer(text, verbose=False, add_special_tokens=False).input_ids)
    answer = "\u241fanswer\u241f"
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    after = [*before, {"role": "user", "content": text}]
    whole: str = tokenizer.apply_chat_template(after, tokenize=False, add_generation_prompt=True)
    ids = list(tokenizer(whole.partition(answer)[2], add_special_tokens=False, verbose=False).input_ids)
    return ids[1:] if ids[:1] == [last_token] else ids


def _read(path: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"prompt file {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"prompt file {str(path)!r} is not UTF-8 text: {error}") from None
