"""From a request to the tokens of its prompt, through the model's chat template where it has one."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from kvoffload.server.errors import refuse
from kvoffload.server.protocol import CompletionRequest, Message


def chat_tokens(messages: Sequence[Message], tokenizer: Any, *, use_template: bool) -> list[int]:
    """The conversation, ready for the next answer; without a template the messages' texts with a blank line between."""
    if not (use_template and getattr(tokenizer, "chat_template", None)):
        return list(tokenizer("\n\n".join(message.text for message in messages), verbose=False).input_ids)
    plain = [{"role": _role(message), "content": message.text} for message in messages]
    try:
        return list(tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False))
    except (TemplateError, TypeError, ValueError) as error:  # a template is a program of the model's
        raise refuse(f"the model's chat template refuses these messages: {error}", param="messages") from error


def completion_tokens(request: CompletionRequest, tokenizer: Any, *, vocabulary: int) -> list[int]:
    """The prompt as it is, tokenised where it is text."""
    prompt = request.single
    if isinstance(prompt, str):
        return list(tokenizer(prompt, verbose=False).input_ids)
    if wrong := [token for token in prompt if token >= vocabulary]:
        raise refuse(f"prompt: token {wrong[0]} is not below {vocabulary}, the size of the vocabulary", param="prompt")
    return prompt


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def check_length(n_prompt: int, limit: int | None, *, context: int, default: int) -> int:
    """How many tokens may be generated; raises RequestError where prompt and answer do not fit the model's context."""
    if n_prompt == 0:
        raise refuse("the prompt is empty: at least one token is needed")
    room = context - n_prompt
    if room < 1 or (limit is not None and limit > room):
        asked = f" and {limit:,} new ones" if limit is not None else ""
        raise refuse(
            f"the prompt has {n_prompt:,} tokens{asked}; the model's context is {context:,}",
            code="context_length_exceeded",
        )
    return min(default, room) if limit is None else limit
