"""``jsonl``: LongBench-style prompts from JSONL files, asked, shortened and scored as LongBench does."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from kvoffload.errors import UsageError
from kvoffload.evaluation.tasks import scoring
from kvoffload.evaluation.tasks.quiz import Question, QuizTask, Scorer, ask
from kvoffload.evaluation.tasks.samples import Sample, cut_middle, read_samples
from kvoffload.evaluation.texts import text_files

TooLong = Literal["cut", "skip"]


class JsonlTask(QuizTask):
    """The samples in the JSONL files of ``text``; one whose prompt and answer exceed the context loses its middle
    (``too_long=cut``, as LongBench does) or is left out (``too_long=skip``)."""

    kind: Literal["jsonl"] = "jsonl"
    text: tuple[Path, ...] = ()
    too_long: TooLong = "cut"

    @property
    def subtasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(sample.task for sample in self._read()))

    @property
    def scorer(self) -> Scorer:
        return scoring.score

    def check(self, contexts: Sequence[int]) -> None:
        seen = set()
        for sample in self._read():
            scoring.check(sample)
            if (sample.task, sample.id) in seen:
                raise UsageError(f"sample {sample.id!r} of task {sample.task!r} is there twice: ids tell samples apart")
            seen.add((sample.task, sample.id))

    def questions(self, tokenizer: Any, context: int) -> list[Question]:
        asked = jsonl_questions(tokenizer, self._read(), context=context, too_long=self.too_long)
        return sorted(asked, key=lambda question: (question.max_new_tokens, len(question.prompt_ids)))

    def _read(self) -> tuple[Sample, ...]:
        return tuple(sample for file in text_files(self.text) for sample in _samples(file))


@lru_cache(maxsize=8)
def _samples(file: Path) -> tuple[Sample, ...]:
    return tuple(read_samples(file))


def jsonl_questions(
    tokenizer: Any, samples: Sequence[Sample], *, context: int, too_long: TooLong = "cut"
) -> list[Question]:
    """The samples as questions whose prompt and answer fit into ``context`` tokens: a longer prompt loses its middle,
    or is left out. Raises UsageError where nothing is left."""
    asked = [_question(tokenizer, sample) for sample in samples]
    if too_long == "skip":
        fitting = [question for question in asked if _excess(question, context) <= 0]
    else:
        fitting = [_shortened(tokenizer, question, context) for question in asked]
    if not fitting:
        raise UsageError(f"none of {len(samples)} prompts fits into {context} tokens with its answer")
    return fitting


def _question(tokenizer: Any, sample: Sample) -> Question:
    task = scoring.longbench_task(sample.task)
    if task is None:
        return ask(tokenizer, sample, max_new_tokens=scoring.DEFAULT_NEW_TOKENS)
    return ask(tokenizer, sample, chat=task.chat, max_new_tokens=task.max_new_tokens)


def _excess(question: Question, context: int) -> int:
    """By how many tokens prompt and answer are too long."""
    return len(question.prompt_ids) + question.max_new_tokens - context


def _shortened(tokenizer: Any, question: Question, context: int) -> Question:
    """Without as much of the middle as it takes. Decoded halves may have other tokens than they had, so a second cut
    can be needed."""
    n_tokens = len(tokenizer(question.sample.prompt, add_special_tokens=False, verbose=False).input_ids)
    short = question
    while (excess := _excess(short, context)) > 0:
        n_tokens -= excess
        if n_tokens < 1:
            raise UsageError(
                f"sample {question.sample.id!r}: context {context} leaves no room for a prompt beside "
                f"{question.max_new_tokens} new tokens"
            )
        prompt = cut_middle(tokenizer, question.sample.prompt, n_tokens)
        short = _question(tokenizer, question.sample.model_copy(update={"prompt": prompt}))
    return short
