"""A ConfigDict, or the dict of a stored run, becomes the typed configuration here, once."""

import dataclasses
import difflib
import math
import typing
from typing import Any, Literal

from ml_collections import ConfigDict

from mixtral_jax.config.checks import validate
from mixtral_jax.config.types import Config, SourceConfig, UserError


def from_config_dict(config: ConfigDict | dict) -> Config:
    """Converts a ConfigDict (or the dict of a stored run) to the typed Config and validates it.

    Raises:
        UserError: an unknown or missing key, a wrong type, or values that contradict each other.
    """
    plain = config.to_dict() if isinstance(config, ConfigDict) else config
    typed = _convert(Config, plain, "")
    validate(typed)
    return typed


def _convert(cls, values: Any, prefix: str):
    if not isinstance(values, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the configuration'} is {values!r}; it must be a group of keys")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys: {', '.join(hints)}"
            raise UserError(f"unknown key {prefix}{key}; {hint}")
    missing = [prefix + key for key in hints if key not in values]
    if missing:
        raise UserError(f"missing {', '.join(missing)}; start from configs/common.py:base(), which has every key")
    return cls(**{key: _value(kind, values[key], prefix + key) for key, kind in hints.items()})


def _value(kind, value: Any, name: str):
    if kind is SourceConfig and isinstance(value, dict):
        # Written by hand as an item of a tuple, where no ConfigDict holds defaults.
        value = {"path": "", "text_key": "text", "name": value.get("path") or value.get("source"), **value}
    if dataclasses.is_dataclass(kind):
        return _convert(kind, value, name + ".")
    if typing.get_origin(kind) is Literal:
        options = typing.get_args(kind)
        if value not in options:
            raise UserError(f"{name}={value!r}; choose one of {', '.join(options)}")
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple | list):
            raise UserError(f"{name}={value!r} is of type {type(value).__name__}; it must be a tuple")
        item = typing.get_args(kind)[0]
        return tuple(_value(item, one, f"{name}[{i}]") for i, one in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}={value}; it must be a finite number")
    if type(value) is not kind:
        raise UserError(f"{name}={value!r} is of type {type(value).__name__}; it must be {kind.__name__}")
    return value
