"""Recipes: YAML <-> frozen dataclasses, strict, overridable from the command line.

A schema is a frozen dataclass; its fields are int, float, str, bool, `X | None`, `tuple[X, ...]`,
`Literal[...]`, `dict[str, X]`, another schema, or a choice `A | B` of schemas: the first whose
keys without a default are all given. `field(metadata={"min": ..., "max": ...})` bounds
a number, or each of a tuple. Every error names the file, the dotted key and what would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from mmrdpm.errors import RecipeError

T = TypeVar("T")


_MOST = 2**31 - 1  # of an integer whose field says no other
_MERGE = "tag:yaml.org,2002:merge"  # of the key `<<`
# what the loader raises of odd dates, numbers, tags and depths
_NO_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


class _Strict(yaml.SafeLoader):
    """YAML's safe loader, to which a key that comes twice in one mapping is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key for key, _ in node.value if key.tag != _MERGE]
        keys = [self.construct_object(key, deep=True) for key in written]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                line = written[place].start_mark.line + 1
                raise yaml.YAMLError(f"the key {key!r} comes twice, again in line {line}")
        return super().construct_mapping(node, deep)


@lru_cache(maxsize=256)  # a sweep reads its base recipes anew for every variant
def _parsed(text: str) -> Any:
    return yaml.load(text, _Strict)


def load(schema: type[T], path: Path | str, overrides: Sequence[str] = ()) -> T:
    """Reads a recipe and applies overrides such as `train.lr=3e-4`.

    Raises:
        RecipeError: the file is missing or no YAML, a key is unknown, missing or of a wrong type.
    """
    return from_dict(schema, read(path, overrides), str(path))


def read(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a recipe file, overrides applied, not yet checked against a schema.

    Raises:
        RecipeError: the file is missing or no YAML mapping, an override is wrong.
    """
    path = Path(path)
    try:
        mapping = deepcopy(_parsed(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except _NO_YAML as error:
        raise RecipeError(f"{path}: not valid YAML: {_why(error)}") from None
    if mapping is None:
        mapping = {}
    if not isinstance(mapping, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, not {_kind(mapping)}")
    return override(mapping, overrides)


def override(mapping: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The mapping, changed by overrides such as `train.lr=3e-4`; the later ones win.

    Raises:
        RecipeError: one is malformed.
    """
    for text in overrides:
        _override(mapping, text)
    return mapping


def from_dict(schema: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """A schema filled from plain mappings; `where` names their origin in errors."""
    return _schema(schema, mapping, where, "")


def to_dict(recipe: Any) -> dict[str, Any]:
    """Plain mappings, lists and scalars, as `from_dict` takes them."""
    return _plain(recipe)


def dump(recipe: Any, path: Path) -> None:
    """Writes the recipe, every default filled in."""
    text = yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _override(mapping: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r}: write it as key=value, e.g. train.lr=3e-4")
    try:
        value = deepcopy(_parsed(text))
    except _NO_YAML as error:
        why = _why(error)
        raise RecipeError(f"override {override!r}: the value is not valid YAML: {why}") from None
    *parents, last = key.split(".")
    for parent in parents:
        parent = _known_as(mapping, parent)
        inner = mapping.get(parent)
        if not isinstance(inner, (dict, type(None))):
            raise RecipeError(f"override {override!r}: {parent!r} holds no keys of its own")
        mapping[parent] = dict(inner or {})  # a copy: by an alias it may stand elsewhere too
        mapping = mapping[parent]
    mapping[_known_as(mapping, last)] = value


def _why(error: Exception) -> str:
    """What the loader raised, in one line."""
    said = " ".join(str(error).split())
    of_tag = isinstance(error, (LookupError, AttributeError, TypeError))
    return f"a tag (!!bool, !!int, ...) does not fit its value: {said}" if of_tag else said


def _known_as(mapping: dict[Any, Any], key: str) -> Any:
    """The key as the file has it: YAML reads some as numbers."""
    return next((known for known in mapping if str(known) == key), key)


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Key, old and new value of all in which two mappings of recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for key in sorted(old.keys() | new.keys())
            for difference in differences(old.get(key), new.get(key), f"{prefix}.{key}".strip("."))
        ]
    return [] if old == new else [(prefix, old, new)]


def of_kind(path: Path, kind: str) -> dict[str, Any]:
    """The mapping of a recipe that must be of one kind, see `read`.

    Raises:
        RecipeError: it is of another.
    """
    mapping = read(path)
    if (found := mapping.get("kind", kind)) != kind:
        raise RecipeError(f"{path}: is of kind {found!r}, not {kind!r}: name one of that kind")
    return mapping


def _schema(schema: type[T], mapping: Any, where: str, prefix: str) -> T:
    if not isinstance(mapping, Mapping):
        place = prefix.rstrip(".") or "the recipe"
        raise RecipeError(f"{where}: {place} must be a mapping of keys, not {_kind(mapping)}")
    hints = typing.get_type_hints(schema)
    fields = {f.name: f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    if "kind" in fields and "kind" in mapping:  # before keys that one of another kind has
        _value(hints["kind"], mapping["kind"], where, f"{prefix}kind")
    for key in mapping:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(fields)}"
            if ":" in str(key):
                hint = "YAML wants a space behind the colon of key: value"
            raise RecipeError(f"{where}: unknown key {prefix}{key}: {hint}")
    values = {}
    for name, spec in fields.items():
        if name in mapping:
            values[name] = _value(hints[name], mapping[name], where, prefix + name)
            _check_range(values[name], spec.metadata, where, prefix + name)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{where}: the key {prefix}{name} is missing")
    return schema(**values)


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner = [arg for arg in args if arg is not type(None)]
        return _value(_chosen(inner, value), value, where, key)
    if origin is Literal:
        if value not in args:
            known = ", ".join(map(str, args))
            mend = f"choose one of {known}" if args[1:] else f"here it must be {known}"
            raise RecipeError(f"{where}: {key} is {value!r}: {mend}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where}: {key} must be a list, not {_kind(value)}")
        return tuple(_value(args[0], v, where, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{where}: {key} must be a mapping of keys, not {_kind(value)}")
        names = [str(k) for k in value]  # YAML takes 1 and "1" for two keys
        for place, name in enumerate(names):
            if name in names[:place]:
                raise RecipeError(f"{where}: {key}.{name} comes twice: give each its own name")
        return {str(k): _value(args[1], v, where, f"{key}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return _schema(hint, value, where, key + ".")  # type: ignore[arg-type]
    return _scalar(hint, value, where, key)


def _chosen(schemas: Sequence[Any], value: Any) -> Any:
    """Of several schemas, the first whose keys without a default are all there, else the last."""
    for schema in schemas[:-1]:
        needed = [
            f.name
            for f in dataclasses.fields(schema)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if isinstance(value, Mapping) and all(name in value for name in needed):
            return schema
    return schemas[-1]


def _scalar(hint: type, value: Any, where: str, key: str) -> Any:
    if hint is float and type(value) in (int, str):
        try:  # YAML 1.1 reads 1e-3, without a point, as a string
            return float(value)
        except OverflowError:
            return math.inf  # which no range allows
        except ValueError:
            pass
    if type(value) is not hint:
        raise RecipeError(
            f"{where}: {key} must be {_article(hint)}, not {_kind(value)} ({reprlib.repr(value)})"
        )
    return value


def _check_range(value: Any, bounds: Mapping[str, Any], where: str, key: str) -> None:
    if type(value) is int and "min" in bounds:
        bounds = {"max": _MOST, **bounds}
    if isinstance(value, tuple):
        for place, item in enumerate(value):
            _check_range(item, bounds, where, f"{key}[{place}]")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: {key} is {value}: it must be a finite number")
    if isinstance(value, (int, float)) and not (
        bounds.get("min", value) <= value <= bounds.get("max", value)
    ):
        limits = " and ".join(
            f"{word} {bounds[name]}"
            for name, word in (("min", "at least"), ("max", "at most"))
            if name in bounds
        )
        raise RecipeError(f"{where}: {key} is {value}: it must be {limits}")


_NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


def _article(hint: type) -> str:
    return _NAMES.get(hint, hint.__name__)


def _kind(value: Any) -> str:
    names = {**_NAMES, dict: "a mapping", list: "a list", type(None): "nothing"}
    return names.get(type(value), type(value).__name__)
