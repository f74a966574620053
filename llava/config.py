"""One run = one YAML = one checked tree of dataclasses: values of the right kind, or an error that names the field."""

import dataclasses
import math
import os
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from llava.errors import ConfigError

T = TypeVar("T")

_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def build(cls: type[T], fields: Any, where: str) -> T:
    """A dataclass from plain values, as YAML and JSON have them.

    Args:
        cls: annotated with str, int, float, bool, Path, Literal, None, dict, sequences of these, other dataclasses,
            and unions.
        fields: name -> value. Numbers may be text as YAML 1.1 leaves it ("1e-5").
        where: file and place, for messages.

    Raises:
        ConfigError: unknown or missing fields, or a value of another kind, with the field's name.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{where} must hold fields, not {type(fields).__name__}")
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(str(name) for name in fields if name not in known):
        raise ConfigError(f"{where}: unknown fields {unknown}; known: {', '.join(known)}")
    needed = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if fields.get(name) is None]:
        raise ConfigError(f"{where}: missing fields {missing}")
    hints = get_type_hints(cls)
    values = {name: _coerce(value, hints[name], where, name) for name, value in fields.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _coerce(value: Any, kind: Any, where: str, name: str) -> Any:
    """`value` as `kind`, an annotation."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _first_fit(value, args, where, name)
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        raise _wrong(value, where, name, " or ".join(map(repr, args)))
    if kind is type(None):
        if value is None:
            return None
        raise _wrong(value, where, name, "nothing")
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):  # type: ignore[arg-type]
            return value
        return build(kind, value, f"{where}, {name}")  # type: ignore[arg-type]
    if origin in (tuple, list, Sequence) or kind in (tuple, list):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise _wrong(value, where, name, "a list")
        item = args[0] if args else Any
        return tuple(_coerce(v, item, where, f"{name}[{i}]") for i, v in enumerate(value))
    if origin in (dict, Mapping) or kind is dict:
        if not isinstance(value, Mapping):
            raise _wrong(value, where, name, "fields")
        item = args[1] if args else Any
        return {key: _coerce(v, item, where, f"{name}.{key}") for key, v in value.items()}
    return _plain(value, kind, where, name)


def _plain(value: Any, kind: Any, where: str, name: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if (
        kind is int
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value == int(value)
    ):
        return int(value)
    if kind is float and not isinstance(value, bool):
        if isinstance(value, str) and _FLOAT.fullmatch(value):
            value = float(value)
        if isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    if kind is str and isinstance(value, str):
        return value
    if kind is Path and isinstance(value, (str, Path)) and str(value).strip():
        return Path(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    raise _wrong(value, where, name, names.get(kind, str(kind)))


def _first_fit(value: Any, kinds: Sequence[Any], where: str, name: str) -> Any:
    """The first kind of a union that takes the value; one that is a dataclass speaks for its own fields."""
    problems = []
    for kind in kinds:
        try:
            return _coerce(value, kind, where, name)
        except ConfigError as error:
            if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
                raise
            problems.append(str(error).rpartition("expected ")[2])
    raise _wrong(value, where, name, ", or ".join(dict.fromkeys(problems)))


def _wrong(value: Any, where: str, name: str, wanted: str) -> ConfigError:
    return ConfigError(f"{where}: field {name!r} is {value!r}, expected {wanted}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file; `${NAME}` and `${NAME:-default}` in texts stand for environment variables.

    Raises:
        ConfigError: no file, no YAML, no fields, or a variable that is not set.
    """
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path} cannot be read as YAML: {reason}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must hold fields, not {type(fields).__name__}")
    expanded: dict[str, Any] = _expand(fields, str(path))
    return expanded


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _expand(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, f"{where}, {key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, where) for item in value]
    if not isinstance(value, str):
        return value

    def variable(found: re.Match[str]) -> str:
        name, default = found.groups()
        text = os.environ.get(name) or default
        if text is None:
            raise ConfigError(f"{where}: the environment variable {name} is not set; export {name}=...")
        return text

    return _VARIABLE.sub(variable, value)


def override(fields: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """`fields` with `key=value` settings on top; `a.b=value` reaches into a section, values are read as YAML.

    Raises:
        ConfigError: a setting that is not of this form.
    """
    result = dict(fields)
    for setting in settings:
        name, sign, text = setting.partition("=")
        path = name.strip().lstrip("-").split(".")
        if not sign or not all(path):
            raise ConfigError(f"setting {setting!r} must read key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"setting {setting!r}: {' '.join(str(error).split())}") from error
        inner = result
        for key in path[:-1]:
            held = inner.get(key)
            inner[key] = dict(held) if isinstance(held, dict) else {}
            inner = inner[key]
        inner[path[-1]] = value
    return result


def plain(config: Any) -> Any:
    """A dataclass tree as `build` reads it: dicts, lists, texts and numbers."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [plain(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def to_yaml(config: Any) -> str:
    """A dataclass tree as text that `read_yaml` and `build` turn into an equal one."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
