"""From what the user gave to the tokens of the prompt."""

import sys
from pathlib import Path
from typing import Any

from kvoffload.errors import UsageError
from kvoffload.settings import Settings


def prompt_text(settings: Settings) -> str:
    """The file's text, a blank line, then ``-p``; raises UsageError when there is nothing."""
    parts = [_read(settings.prompt_file)] if settings.prompt_file else []
    if settings.prompt:
        parts.append(settings.prompt)
    text = "\n\n".join(part.rstrip("\n") for part in parts)
    if not text.strip():
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


def _read(path: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"prompt file {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"prompt file {str(path)!r} is not UTF-8 text: {error}") from None
