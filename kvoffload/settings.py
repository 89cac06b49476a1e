"""Everything the command line can be told, merged: TOML file < ``KVOFFLOAD_*`` environment < flags."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from kvoffload.config import RuntimeConfig, SamplingConfig, explain
from kvoffload.errors import UsageError


class Settings(BaseSettings, RuntimeConfig, SamplingConfig):
    """RuntimeConfig and SamplingConfig, and what a command needs beside them."""

    model_config = SettingsConfigDict(
        env_prefix="KVOFFLOAD_", env_ignore_empty=True, enable_decoding=False, frozen=True, extra="forbid"
    )

    model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    prompt: str | None = None
    prompt_file: Path | None = None
    system: str | None = None
    chat_template: bool = True
    session: Path | None = None
    session_readonly: bool = False
    output: Literal["text", "json"] = "text"
    quiet: bool = False

    def runtime(self) -> RuntimeConfig:
        return RuntimeConfig.model_construct(**{name: getattr(self, name) for name in RuntimeConfig.model_fields})

    def sampling(self) -> SamplingConfig:
        return SamplingConfig.model_construct(**{name: getattr(self, name) for name in SamplingConfig.model_fields})

    def merged(self) -> dict[str, Any]:
        """The merged result in plain values, the default budget spelled out."""
        return {**self.model_dump(mode="json"), "budget": str(self.effective_budget)}


S = TypeVar("S", bound=Settings)


def load_settings(flags: Mapping[str, Any], config_file: Path | None = None) -> Settings:
    """Settings from the three sources; flags that are None were not given. Raises UsageError in one line."""
    return load_settings_of(Settings, flags, config_file)


def load_settings_of(kind: type[S], flags: Mapping[str, Any], config_file: Path | None = None) -> S:
    """The same for a command with more settings."""
    from_file = read_toml(config_file) if config_file else {}

    class Layered(kind):  # type: ignore[valid-type, misc]
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource, dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=from_file)

    try:
        merged: S = Layered(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise UsageError(explain(error, kind.model_fields)) from None
    return merged


def to_toml(values: Mapping[str, Any]) -> str:
    """Plain values as TOML that ``--config`` reads back; None is left out, because leaving a key out means it."""
    return "\n".join(f"{name} = {_toml_value(value)}" for name, value in values.items() if value is not None)


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file; raises UsageError if it cannot be read or is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"config file {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {str(path)!r} is not TOML: {error}") from None


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_toml_value(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
