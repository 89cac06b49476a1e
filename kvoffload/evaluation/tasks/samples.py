"""Prompts with their expected answers: the lines of a JSONL file, and the tokens that a model is given."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvoffload.errors import UsageError

_Text = Annotated[str, Field(min_length=1)]
_EXPECTED = "task, id, prompt, answers [texts], optional answer_prefix, max_new_tokens, all_classes"


class Sample(BaseModel):
    """One prompt. ``answer_prefix`` begins the answer in the model's stead; ``all_classes`` are the labels of a
    classification; without ``max_new_tokens`` the task decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: _Text
    id: _Text
    prompt: _Text
    answers: Annotated[tuple[_Text, ...], Field(min_length=1)]
    answer_prefix: str = ""
    max_new_tokens: Annotated[int, Field(ge=1, le=65536)] | None = None
    all_classes: tuple[_Text, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _unwrap(cls, fields: Any) -> Any:
        """LongBench's own conversions of trec and lsht put answers and labels into one object inside ``answers``."""
        match fields:
            case {"answers": [{"answers": answers, "all_classes": labels, **rest}]} if not rest:
                return fields | {"answers": answers, "all_classes": labels}
        return fields


def read_samples(path: Path) -> list[Sample]:
    """All lines of a JSONL file; raises UsageError that names the first bad line and what is wrong with it."""
    samples = []
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    samples.append(_parse(line, f"{str(path)!r} line {number}"))
    except OSError as error:
        raise UsageError(f"data file {str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"data file {str(path)!r} is not UTF-8 text: {error}") from None
    if not samples:
        raise UsageError(f"data file {str(path)!r} holds no sample: one JSON object a line is expected")
    return samples


def _parse(line: str, where: str) -> Sample:
    try:
        return Sample.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        said = first["msg"][:1].lower() + first["msg"][1:]
        raise UsageError(f"{where}: {field + ': ' if field else ''}{said}; expected: {_EXPECTED}") from None


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write a JSONL file as a whole: it is there complete, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    half.write_text("".join(s.model_dump_json(exclude_defaults=True) + "\n" for s in samples), encoding="utf-8")
    half.replace(path)


def prompt_tokens(tokenizer: Any, prompt: str, answer_prefix: str = "", *, chat: bool = True) -> list[int]:
    """Tokens of the prompt inside the model's chat template (where it has one and ``chat`` wants it), then those of the
    begun answer."""
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        return ids + plain_tokens(tokenizer, answer_prefix)
    return list(tokenizer(f"{prompt} {answer_prefix}" if answer_prefix else prompt, verbose=False).input_ids)


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text alone, without those that begin a sequence."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else []


def cut_middle(tokenizer: Any, prompt: str, n_tokens: int) -> str:
    """The prompt itself if it has at most ``n_tokens`` tokens, else its first and last half of them, as LongBench
    shortens prompts."""
    ids: Sequence[int] = plain_tokens(tokenizer, prompt)
    if len(ids) <= n_tokens:
        return prompt
    first, last = ids[: n_tokens // 2], ids[len(ids) - (n_tokens - n_tokens // 2) :]
    return "".join(str(tokenizer.decode(part, skip_special_tokens=True)) for part in (first, last))
