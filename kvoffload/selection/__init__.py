"""Selectors: which pages a step reads. Adding one takes its file and its name in the union below."""

from typing import Annotated

from pydantic import Field

from kvoffload.selection.anchored import AnchoredSelectorConfig
from kvoffload.selection.bounds import BoundsSelectorConfig
from kvoffload.selection.exact import ExactSelectorConfig
from kvoffload.selection.mean import MeanSelectorConfig
from kvoffload.selection.quantized import QuantizedSelectorConfig
from kvoffload.selection.spread import SpreadSelectorConfig
from kvoffload.selection.transform import TransformSelectorConfig
from kvoffload.selection.uniform import UniformSelectorConfig

SelectorConfig = Annotated[
    QuantizedSelectorConfig
    | TransformSelectorConfig
    | BoundsSelectorConfig
    | MeanSelectorConfig
    | AnchoredSelectorConfig
    | SpreadSelectorConfig
    | ExactSelectorConfig
    | UniformSelectorConfig,
    Field(discriminator="kind"),
]
