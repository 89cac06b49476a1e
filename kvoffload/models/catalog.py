"""From the name of a model to the model: built-in names, folders, .gguf files and hub names.

``resolve`` touches neither network nor transformers, so that a misspelt name fails at once.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvoffload.errors import OutOfRoomError, UnsupportedModelError, UsageError
from kvoffload.models import demo
from kvoffload.models.parallel import ALONE, Ranks
from kvoffload.models.progress import LoadProgress, OnProgress, gguf_progress, ignore, quiet_transformers
from kvoffload.models.shapes import SHAPES, byte_tokenizer, shape_config, shape_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEMO = "smollm2-135m"
BUILT_IN = (DEMO, *SHAPES)
ACCEPTED = f"accepted: {', '.join(BUILT_IN)}, a folder, a .gguf file, or a hub name such as HuggingFaceTB/SmolLM2-135M"
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from; ``revision`` and ``trust_remote_code`` matter for hub names and folders only."""

    kind: Literal["demo", "shape", "folder", "gguf", "hub"]
    name: str
    path: Path | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """What the Auto classes of transformers take to find it (not for shapes)."""
        if self.kind == "gguf" and self.path is not None:
            return str(self.path.parent), {"gguf_file": self.path.name}
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.revision is not None:
            options["revision"] = self.revision
        return str(self.path or self.name), options


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode on its device, with what belongs to it."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    config: "PreTrainedConfig"
    ranks: Ranks = ALONE


def resolve(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """What a name means; raises UsageError with the accepted forms when it can mean nothing."""
    if name == DEMO:
        return ModelSource("demo", name)
    if name in SHAPES:
        return ModelSource("shape", name)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource("gguf", name, path.absolute())
    if path.is_dir() and (path / "config.json").is_file():
        return ModelSource("folder", name, path.absolute(), revision, trust_remote_code)
    if path.exists():
        raise UsageError(f"model {name!r} is neither a .gguf file nor a folder with a config.json; {ACCEPTED}")
    if not _HUB_NAME.fullmatch(name) or path.suffix == ".gguf":
        raise UsageError(f"model {name!r} is unknown; {ACCEPTED}")
    return ModelSource("hub", name, None, revision, trust_remote_code)


def load_config(source: ModelSource) -> "PreTrainedConfig":
    """The model's config without its weights; the demo's is known without a download."""
    from transformers import AutoConfig

    if source.kind == "shape":
        return shape_config(source.name)
    if source.kind == "demo":
        return AutoConfig.for_model("llama", **demo.CONFIG)
    location, options = source.arguments()
    with _loading(source):
        config: PreTrainedConfig = AutoConfig.from_pretrained(location, **options)
    return config


def load_tokenizer(source: ModelSource, on_progress: OnProgress = ignore) -> "PreTrainedTokenizerBase":
    """The model's tokenizer; of the demo, after its download on first use."""
    from transformers import AutoTokenizer

    if source.kind == "shape":
        return byte_tokenizer()
    location, options = localize(source, on_progress).arguments()
    with _loading(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, **options)
    return tokenizer


def load_model(
    source: ModelSource,
    *,
    dtype: "torch.dtype | str",
    device: "torch.device | str",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    on_progress: OnProgress = ignore,
    ranks: Ranks = ALONE,
) -> LoadedModel:
    """Load weights and tokenizer (unless it is given) with the library's default attention; names may be ``auto``.
    Of several ranks each loads its part."""
    device = ranks.device(str(device)) if ranks.several else pick_device(str(device))
    tokenizer = tokenizer or load_tokenizer(source, on_progress)
    config = load_config(source)
    ranks.check_model(config)
    ranks = ranks.joined()
    dtype = pick_dtype(dtype, config, device)
    if source.kind == "shape":
        with _refusals(source.name):
            model = shape_model(config, dtype=dtype, device=device)
            model = ranks.split(model) if ranks.several else model
    else:
        placement = ranks.loading() if ranks.several else {"device_map": {"": device}} if device.type != "cpu" else {}
        model = _pretrained(localize(source, on_progress), dtype, placement, on_progress)
    model.config.name_or_path = str(source.path or source.name)
    return LoadedModel(model, tokenizer, source.name, model.config, ranks)


def localize(source: ModelSource, on_progress: OnProgress = ignore) -> ModelSource:
    """The source itself, or for the demo the folder that it was converted into."""
    if source.kind != "demo":
        return source
    return ModelSource("folder", source.name, demo.demo_folder(on_progress))


def weight_bytes(config: "PreTrainedConfig", dtype: "torch.dtype", *, trust_remote_code: bool = False) -> int:
    """Bytes that the weights will take, without allocating them."""
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    with quiet_transformers(), _refusals(config.model_type), torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def pick_device(name: str) -> "torch.device":
    """``auto`` is CUDA where there is a device, else the CPU; raises UsageError for one that is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices were found")
    return device


def pick_dtype(name: "torch.dtype | str", config: "PreTrainedConfig", device: "torch.device") -> "torch.dtype":
    """``auto`` is fp32 on a CPU, elsewhere what the checkpoint says (bf16 where it says nothing)."""
    import torch

    chosen: Any = name
    if name == "auto":
        stored = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.bfloat16
        chosen = torch.float32 if device.type == "cpu" else stored
    dtype: torch.dtype = getattr(torch, str(chosen).removeprefix("torch."))
    return dtype


def _pretrained(
    source: ModelSource, dtype: "torch.dtype", placement: dict[str, Any], on_progress: OnProgress
) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    step = f"loading {source.name}"
    on_progress(LoadProgress(step))
    location, options = source.arguments()
    with _loading(source), gguf_progress(step, on_progress):
        loaded = auto.from_pretrained(location, dtype=dtype, output_loading_info=True, **placement, **options)
    model: PreTrainedModel = loaded[0].eval()
    report: dict[str, Any] = loaded[1]
    if missing := sorted(report["missing_keys"]):
        raise UnsupportedModelError(f"model {source.name!r} lacks {len(missing)} weights, the first is {missing[0]!r}")
    return model


@contextmanager
def _loading(source: ModelSource) -> Iterator[None]:
    """Turn what transformers raises about a missing or unreadable model into one line."""
    from safetensors import SafetensorError

    with quiet_transformers(), _refusals(source.name):
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UsageError(f"model {source.name!r} cannot be loaded: {_first_line(error)}; {ACCEPTED}") from error


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfRoomError(f"model {name!r} does not fit on the device: {_first_line(error)}") from error
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
