"""The flags that only ``kvoffload sweep`` has."""

from pathlib import Path
from typing import Annotated

import typer

from kvoffload.flags import flag

Task = Annotated[
    str | None, flag("--task", "-t", help="kl, output, ruler, jsonl or extract; options as in kl:texts=4.")
]
Text = Annotated[
    list[Path] | None, flag("--text", help="Text file, folder or pattern; may be repeated. The task says what of.")
]
Texts = Annotated[int | None, flag("--texts", help="Pieces of text, or prompts.", default="the task's")]
Positions = Annotated[
    int | None, flag("--positions", help="Teacher-forced positions of each piece.", default="the task's")
]
Batch = Annotated[int | None, flag("--batch", help="Sequences decoded side by side.", default="the task's")]
Seed = Annotated[int | None, flag("--seed", help="Seed of the samples and of the intervals.", default="0")]
Contexts = Annotated[str | None, flag("--contexts", help="Prompt tokens, as in 4096,8k.")]
Budgets = Annotated[str | None, flag("--budgets", help="As in 1%,2%,5%.")]
BaselineBudgets = Annotated[
    str | None, flag("--baseline-budgets", help="More budgets, for methods with neither completion nor policy.")
]
Selectors = Annotated[
    str | None,
    flag("--selectors", help="Selectors, each combined with every completion; separated by ; or by commas that no "
         "name= follows."),
]  # fmt: skip
Completions = Annotated[
    str | None, flag("--completions", help="Completions, as in none,anchored:segments=16,anchored+pages@gate.")
]
Policies = Annotated[
    str | None,
    flag("--policies", help="Policies, each combined with every selector and completion, as in "
         "none,retro:window=4;prhs:block=8+retro."),
]  # fmt: skip
Pools = Annotated[str | None, flag("--pools", help="layer, none or both; combined with the others.")]
Methods = Annotated[
    str | None,
    flag("--methods", help="Single methods selector/completion, with other settings behind @, as in "
         "bounds/none;quantized/anchored+pages@gate@pool=none."),
]  # fmt: skip
Baseline = Annotated[
    str | None, flag("--baseline", help="The method that others are compared with.", default="bounds/none")
]
Set = Annotated[
    list[str] | None,
    flag("--set", help="Any other runtime setting for all methods, as index=cpu; may be repeated."),
]
Shard = Annotated[
    str | None, flag("--shard", help="Do part i of n of the work (i/n), beside other processes on one --out.")
]
Ray = Annotated[
    bool,
    flag("--ray", help="Spread all parts over the Ray cluster of RAY_ADDRESS, or this machine; all nodes see --out."),
]
Parts = Annotated[
    int | None, typer.Option("--parts", min=1, show_default="one a GPU", help="Parts of the work with --ray.")
]
Plots = Annotated[bool | None, flag("--plots/--no-plots", help="Draw pictures.", default="on")]
Out = Annotated[
    Path | None,
    flag("--out", "-o", help="Folder for samples, sweep.json, sweep.csv, report.md and pictures; what is in it is not "
         "measured again."),
]  # fmt: skip
SweepConfig = Annotated[Path | None, flag("--config", help="TOML file of these options; flags go before it.")]
