"""The flags that only ``kvoffload calibrate`` has."""

from pathlib import Path
from typing import Annotated

from kvoffload.flags import flag

Data = Annotated[
    list[Path] | None, flag("--data", help="Text file to learn from; may be repeated.", default="required")
]
Out = Annotated[
    Path,
    flag("--out", help="The file to make; what is done so far is in OUT.partial.", default="calibration.safetensors"),
]
Completion = Annotated[
    str | None,
    flag(
        "--completion",
        help="phi (learned feature maps), anchored or pages (offsets of their mass).",
        default="phi",
    ),
]
ByLayer = Annotated[
    bool,
    flag(
        "--by-layer",
        help="Measure instead how to share --budget out over the layers, for --layer-budgets.",
        default="off",
    ),
]
Context = Annotated[str | None, flag("--context", help="Tokens a sequence, such as 4k.", default="4096")]
Sequences = Annotated[int | None, flag("--sequences", help="Sequences; the last eighth is held out.", default="16")]
Queries = Annotated[int | None, flag("--queries", help="Positions of each sequence.", default="64")]
Budgets = Annotated[
    str | None, flag("--budgets", help="What the selector may read while learning.", default="1%,2%,5%")
]
Features = Annotated[int | None, flag("--features", help="Features of a map.", default="64")]
Family = Annotated[str | None, flag("--family", help="exp or hedgehog.", default="exp")]
KeyMaps = Annotated[
    str | None, flag("--key-maps", help="shared by the query heads of a kv head, or one for each.", default="shared")
]
Steps = Annotated[int | None, flag("--steps", help="Training steps a layer.", default="300")]
Rate = Annotated[float | None, flag("--rate", help="First learning rate.", default="0.02")]
Seed = Annotated[int | None, flag("--seed", help="Seed of the training.", default="0")]
HostMax = Annotated[
    str | None, flag("--host-max", help="Host memory for captures; fewer layers a pass fit into less.", default="8G")
]
