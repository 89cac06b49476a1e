"""Completions: what stands for the pages that were not read. Adding one takes its file and its name in the union
below."""

from typing import Annotated

from pydantic import Field

from kvoffload.completion.anchored import AnchoredCompletionConfig
from kvoffload.completion.exact import ExactCompletionConfig
from kvoffload.completion.none import NoCompletionConfig
from kvoffload.completion.pages import PagesCompletionConfig
from kvoffload.completion.phi import PhiCompletionConfig

CompletionConfig = Annotated[
    AnchoredCompletionConfig | NoCompletionConfig | PhiCompletionConfig | PagesCompletionConfig | ExactCompletionConfig,
    Field(discriminator="kind"),
]
