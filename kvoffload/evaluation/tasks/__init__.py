"""Tasks of the sweep: what is measured. Adding one takes its file and its name in the union below."""

from typing import Annotated

from pydantic import Field

from kvoffload.evaluation.tasks.extract import ExtractTask
from kvoffload.evaluation.tasks.jsonl import JsonlTask
from kvoffload.evaluation.tasks.kl import KlTask
from kvoffload.evaluation.tasks.output import OutputTask
from kvoffload.evaluation.tasks.ruler import RulerTask

TaskConfig = Annotated[KlTask | OutputTask | RulerTask | JsonlTask | ExtractTask, Field(discriminator="kind")]
