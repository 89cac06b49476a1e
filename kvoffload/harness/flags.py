"""The flags that only ``kvoffload eval`` has."""

from pathlib import Path
from typing import Annotated

from kvoffload.flags import flag

Tasks = Annotated[
    str | None, flag("--tasks", "-t", help="Tasks and groups of lm-eval, as in ruler,longbench, or .yaml files.")
]
Include = Annotated[
    list[Path] | None, flag("--include", help="Folder with tasks of your own (.yaml); may be repeated.")
]
Limit = Annotated[int | None, flag("--limit", help="Samples of each task.", default="all")]
Fewshot = Annotated[int | None, flag("--fewshot", help="Worked examples before a question.", default="the task's")]
Contexts = Annotated[str | None, flag("--contexts", help="Lengths of RULER's prompts, as in 4096,8k.", default="4096")]
BatchSize = Annotated[int | None, flag("--batch-size", help="Choices of one question a forward.", default="8")]
MaxLength = Annotated[
    str | None, flag("--max-length", help="Newest tokens of a prompt that are read.", default="the model's")
]
ApplyChatTemplate = Annotated[
    bool | None,
    flag("--apply-chat-template/--no-apply-chat-template", help="Ask by the tokenizer's chat template.", default="off"),
]  # fmt: skip
Out = Annotated[Path | None, flag("--out", "-o", help="File for everything lm-eval says of it, every sample included.")]
