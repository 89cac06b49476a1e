"""``ruler``: lm-eval's own samples, inside the chat template, with the answer begun; scored by string match."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kvoffload.errors import UsageError
from kvoffload.evaluation.tasks.quiz import Question, QuizTask, Scorer, ask
from kvoffload.evaluation.tasks.ruler_samples import MIN_CONTEXT, TASKS, Recipe, all_ruler_samples
from kvoffload.evaluation.tasks.samples import Sample
from kvoffload.evaluation.tasks.scoring import string_match
from kvoffload.evaluation.texts import read_text, text_files


def _joined(value: Any) -> Any:
    return tuple(filter(None, value.split("+"))) if isinstance(value, str) else value


class RulerTask(QuizTask):
    """``texts`` samples of each RULER task in ``names`` (all eleven where none is given); needles of most are hidden in
    the prose of ``text``. ``samples`` is a folder in which samples are kept: what is there already needs no lm-eval."""

    kind: Literal["ruler"] = "ruler"
    text: tuple[Path, ...] = ()
    texts: int = Field(default=20, ge=1)
    names: Annotated[tuple[str, ...], BeforeValidator(_joined)] = ()
    samples: Path | None = None

    @property
    def subtasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.names)) or tuple(TASKS)

    @property
    def scorer(self) -> Scorer:
        return ruler_score

    def check(self, contexts: Sequence[int]) -> None:
        unknown = [name for name in self.names if name not in TASKS]
        if unknown:
            raise UsageError(f"RULER task {unknown[0]!r} is unknown; accepted: {', '.join(TASKS)}")
        if contexts and min(contexts) < MIN_CONTEXT:
            raise UsageError(f"context {min(contexts)} is too short for RULER: at least {MIN_CONTEXT} is expected")
        if any(TASKS[name].essays for name in self.subtasks):
            text_files(self.text)

    def questions(self, tokenizer: Any, context: int) -> list[Question]:
        prose = "\n\n".join(read_text(file) for file in text_files(self.text)) if self.text else None
        recipes = [Recipe(name, context, self.seed, tokenizer, prose) for name in self.subtasks]
        return [ask(tokenizer, sample) for sample in all_ruler_samples(recipes, self.texts, self.samples)]


def ruler_score(sample: Sample, text: str) -> float:
    """Share of the expected strings that appear, 0 to 100."""
    return string_match(text, sample.answers)
