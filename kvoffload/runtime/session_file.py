"""What a session file says beside its pages, and whether it fits a model and a configuration."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import torch
from kvoffload_storage.bundle import Bundle
from kvoffload_storage.bundle_format import StoreEntry
from kvoffload_storage.errors import IntegrityError
from kvoffload_storage.store import StoreShape
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.errors import UsageError
from kvoffload.models.cache_state import LayerState

Count = Annotated[int, Field(ge=0)]
LAYOUT = "page,row,kv,token,channel"  # of the bytes of a page


class _Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Fingerprint(_Described):
    """Everything that changes the bytes of a page, or where a token lies."""

    weights: str
    dtype: str
    rotary: str
    layout: str = LAYOUT
    page_size: Annotated[int, Field(ge=1)]
    sinks: Count
    recent: Count


class Description(_Described):
    """A session without its pages and tensors. ``prompt_end`` is where the prompt ends whose command has not ended."""

    model: str
    fingerprint: Fingerprint
    versions: dict[str, str]
    policy: str
    n_tokens: Count
    n_in_kv: Count
    prompt_tokens: Count
    unfinished: bool
    prompt_start: Count
    prompt_end: Count | None = None
    sampling: dict[str, Any] | None
    layers: list[LayerState]


def fingerprint_of(weights: str, model_config: Any, dtype: torch.dtype, config: RuntimeConfig) -> Fingerprint:
    """Of a model, by its weights' hash, under a configuration."""
    text = model_config.get_text_config(decoder=True)
    rotary = {name: getattr(text, name, None) for name in ("rope_parameters", "rope_scaling", "rope_theta")}
    found = {name: value for name, value in sorted(rotary.items()) if value is not None}
    return Fingerprint(
        weights=weights,
        dtype=str(dtype).removeprefix("torch."),
        rotary=json.dumps(found, sort_keys=True, default=str),
        page_size=config.page_size,
        sinks=config.sinks,
        recent=config.recent,
    )


def policy_of(config: RuntimeConfig) -> str:
    """What makes summaries and the gate's choice: other text, other summaries."""
    return config.model_dump_json(include={"selector", "completion", "gate", "gate_queries", "gate_margin", "budget"})


def versions() -> dict[str, str]:
    """Of what computes, for a warning when it changes."""
    names = ("kvoffload", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def check_fingerprint(path: object, saved: Fingerprint, here: Fingerprint) -> None:
    """Raises UsageError that names every difference."""
    ours = here.model_dump()
    different = [
        f"{name} {value!r} (here {ours[name]!r})" for name, value in saved.model_dump().items() if value != ours[name]
    ]
    if different:
        raise UsageError(f"session {str(path)!r} was made with other {', '.join(different)}")


def changed_versions(saved: dict[str, str]) -> str:
    """What a user should be told about library versions; empty when they are the same."""
    here = versions()
    changed = [f"{name} {saved.get(name)} (here {now})" for name, now in here.items() if saved.get(name) != now]
    return f"the session was made with {', '.join(changed)}; results may differ in rounding" if changed else ""


def describe(data: dict[str, Any], name: object) -> Description:
    """The description in a manifest; IntegrityError when it is none of ours."""
    try:
        found = Description.model_validate(data)
        SamplingConfig.model_validate(found.sampling or {})
        return found
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"{name}: session.{where}: {str(first['input'])[:120]!r}: {first['msg']}") from error


def read_description(bundle: Bundle) -> tuple[Description, dict[str, Tensor]]:
    """What an open session says beside its pages; IntegrityError when that is none of ours, or when its counts are not
    those of its tokens and pages."""
    description = describe(bundle.manifest.session, bundle.path)
    tensors = decode_state(bundle.state, description, bundle.path / bundle.manifest.state.file)
    _check_pages(description, bundle.manifest.stores, bundle.path)
    return description, tensors


def encode_state(tensors: dict[str, Tensor]) -> bytes:
    """As safetensors."""
    return save(tensors)


def decode_state(data: bytes, description: Description, name: object) -> dict[str, Tensor]:
    """The tensors of a state file; IntegrityError when they are not those of the description."""
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{name}: not a state file: {error}") from error
    ids = tensors.get("token_ids")
    if ids is None or ids.dtype != torch.int64 or ids.shape != (description.n_tokens,):
        raise IntegrityError(f"{name}: token_ids is not int64 [{description.n_tokens}]")
    most = max(description.n_in_kv, description.prompt_tokens, description.prompt_start, description.prompt_end or 0)
    if most > description.n_tokens:
        raise IntegrityError(f"{name}: {description.n_tokens} tokens, expected {most} at least")
    for i, layer in enumerate(description.layers):
        _check_layer(i, layer, description, tensors, name)
    return tensors


def _check_pages(whole: Description, stores: Sequence[StoreEntry], name: object) -> None:
    """Every layer has the pages of its tokens, and no store has others."""
    layers = [layer for layer in whole.layers if layer.offloaded]
    expected: dict[StoreShape, list[int]] = {}
    for place, layer in enumerate(layers):
        n_pages, rest = divmod(
            max(layer.n_tokens - whole.fingerprint.sinks, 0) - layer.n_window, whole.fingerprint.page_size
        )
        if rest or any(n is not None and not 0 <= n <= n_pages for n in (layer.n_prefilled, layer.n_anchored)):
            raise IntegrityError(f"{name}: layer {place} cannot have {layer.n_tokens} tokens like this: {layer}")
        shape = StoreShape(len(layers), layer.n_kv_heads, _slice_bytes(whole.fingerprint, layer))
        expected.setdefault(shape, [0] * len(layers))[place] = n_pages
    found = {store.shape: store.n_pages for store in stores}
    if found != expected:
        raise IntegrityError(f"{name}: pages {found}, expected {expected} for {whole.n_in_kv} tokens")


def _slice_bytes(print_: Fingerprint, layer: LayerState) -> int:
    itemsize: int = getattr(torch, print_.dtype).itemsize
    return print_.page_size * (layer.key_dim + layer.value_dim) * itemsize


def _check_layer(i: int, layer: LayerState, whole: Description, tensors: dict[str, Tensor], name: object) -> None:
    if not layer.offloaded:
        return
    print_ = whole.fingerprint
    places = print_.sinks + -(-print_.recent // print_.page_size) * print_.page_size + print_.page_size
    rows = layer.n_kv_heads
    if not 0 <= layer.n_window <= min(places - print_.sinks, layer.n_tokens) or layer.n_tokens != whole.n_in_kv:
        raise IntegrityError(f"{name}: layer {i} has {layer.n_tokens} tokens, {layer.n_window} of them in its window")
    wanted = {
        f"{i}.keys": (rows, places, layer.key_dim),
        f"{i}.values": (rows, places, layer.value_dim),
    }
    for key, shape in wanted.items():
        found = tensors.get(key)
        if found is None or tuple(found.shape) != shape or str(found.dtype) != f"torch.{print_.dtype}":
            raise IntegrityError(f"{name}: {key} is not {print_.dtype} {list(shape)}")
    anchor = tensors.get(f"{i}.anchor")
    if layer.n_anchored is not None and (anchor is None or anchor.shape != (rows, layer.key_dim)):
        raise IntegrityError(f"{name}: {i}.anchor is not [{rows}, {layer.key_dim}]")
    tail = tensors.get(f"{i}.tail")
    if tail is None or tail.dim() != 4 or tail.shape[:2] != (rows, layer.group_size) or tail.shape[3] != layer.key_dim:
        raise IntegrityError(f"{name}: {i}.tail is not [{rows}, {layer.group_size}, n, {layer.key_dim}]")
