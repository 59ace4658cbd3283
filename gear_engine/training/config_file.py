"""Training settings from a TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from gear_engine.config import TOKENIZER_PRESETS, TokenizerConfig
from gear_engine.errors import ConfigError
from gear_engine.training.config import TrainConfig

__all__ = ["config_from_table", "load_config"]

Settings = TypeVar("Settings")


def load_config(path: Path | str) -> TrainConfig:
    """The settings in a TOML file; every key is a field of :class:`TrainConfig` or of one of its sections.

    ``[tokenizer] preset = "VQ-16"`` names a published architecture whose other fields may be overridden.

    Raises:
        ConfigError: unreadable, an unknown key, a value of the wrong type or out of range.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML file: {error}") from error
    try:
        return config_from_table(table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def config_from_table(table: dict[str, Any]) -> TrainConfig:
    """Settings from nested tables, as TOML and :meth:`TrainConfig.to_dict` have them."""
    return _build(TrainConfig, table, "")


def _build(kind: type[Settings], table: Any, where: str) -> Settings:
    if not isinstance(table, dict):
        raise ConfigError(f"{where or 'the file'} must be a table, got {type(table).__name__}")
    table = dict(table)
    base: dict[str, Any] = {}
    if kind is TokenizerConfig and "preset" in table:
        name = table.pop("preset")
        if name not in TOKENIZER_PRESETS:
            raise ConfigError(f"{where}.preset {name!r} is not known; known: {', '.join(TOKENIZER_PRESETS)}")
        base = TOKENIZER_PRESETS[name].to_dict()
    hints = get_type_hints(kind)
    unknown = sorted(set(table) - set(hints))
    if unknown:
        raise ConfigError(f"{_join(where, unknown[0])} is no setting; known here: {', '.join(sorted(hints))}")
    values = base | {name: _value(hints[name], value, _join(where, name)) for name, value in table.items()}
    missing = [
        name.name
        for name in dataclasses.fields(typing.cast(Any, kind))
        if name.name not in values
        and name.default is dataclasses.MISSING
        and name.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{_join(where, missing[0])} is missing")
    return kind(**values)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the field's type has it."""
    if get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, where)
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)) or not all(type(item) is int for item in value):
            raise ConfigError(f"{where} must be a list of integers, got {value!r}")
        return tuple(value)
    wanted: Any = str if get_origin(hint) is typing.Literal else hint
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ConfigError(f"{where} must be a {wanted.__name__}, got {value!r}")
    return value
