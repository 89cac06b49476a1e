"""Completions: what stands for the pages that were not read. Adding one takes its file and its name in the union
below."""

from typing import Annotated

from pydantic import Field

from kvoffload.completion.anchored import AnchoredCompletionConfig
from kvoffload.completion.centroids import CentroidsCompletionConfig
from kvoffload.completion.chelsea import ChelseaCompletionConfig
from kvoffload.completion.exact import ExactCompletionConfig
from kvoffload.completion.index_mass import IndexMassCompletionConfig
from kvoffload.completion.keepkv import KeepkvCompletionConfig
from kvoffload.completion.mean_value import MeanValueCompletionConfig
from kvoffload.completion.moments import MomentsCompletionConfig
from kvoffload.completion.none import NoCompletionConfig
from kvoffload.completion.page_mean import PageMeanCompletionConfig
from kvoffload.completion.pages import PagesCompletionConfig
from kvoffload.completion.phi import PhiCompletionConfig
from kvoffload.completion.rank1 import Rank1CompletionConfig
from kvoffload.completion.regression import RegressionCompletionConfig
from kvoffload.completion.sketch import SketchCompletionConfig

CompletionConfig = Annotated[
    RegressionCompletionConfig
    | AnchoredCompletionConfig
    | NoCompletionConfig
    | PhiCompletionConfig
    | PagesCompletionConfig
    | ExactCompletionConfig
    | PageMeanCompletionConfig
    | CentroidsCompletionConfig
    | Rank1CompletionConfig
    | MeanValueCompletionConfig
    | MomentsCompletionConfig
    | IndexMassCompletionConfig
    | SketchCompletionConfig
    | KeepkvCompletionConfig
    | ChelseaCompletionConfig,
    Field(discriminator="kind"),
]
