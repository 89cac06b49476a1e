"""``extract``: twenty fields scattered over a long document, all of them asked for at once (``extract_samples``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from kvoffload.evaluation.tasks.extract_samples import extract_samples, right_fields
from kvoffload.evaluation.tasks.quiz import Question, QuizTask, Scorer, ask
from kvoffload.evaluation.tasks.samples import Sample
from kvoffload.evaluation.texts import read_text, text_files


class ExtractTask(QuizTask):
    """``texts`` documents whose prose is taken from ``text``; document, question and answer fill the context."""

    kind: Literal["extract"] = "extract"
    text: tuple[Path, ...] = ()
    texts: int = Field(default=20, ge=1)

    @property
    def scorer(self) -> Scorer:
        return extract_score

    def check(self, contexts: Sequence[int]) -> None:
        text_files(self.text)

    def questions(self, tokenizer: Any, context: int) -> list[Question]:
        prose = "\n\n".join(read_text(file) for file in text_files(self.text))
        samples = extract_samples(tokenizer, prose, context=context, n_samples=self.texts, seed=self.seed)
        return [ask(tokenizer, sample) for sample in samples]


def extract_score(sample: Sample, text: str) -> float:
    """Share of the twenty fields that are right, 0 to 100; the begun answer counts as said."""
    return right_fields(sample.answer_prefix + text, sample.answers)
