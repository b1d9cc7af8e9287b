"""Recipes: the values of a training, in small TOML files. Some come with the package; anyone can write one.

A recipe has a table for each kind of training. What a command line says comes on top of it, and what neither says is
the configuration's own default.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from moclip.errors import RunError
from moclip.pipeline.learn.training import Training

Config = TypeVar("Config", bound=Training)
_KINDS = ("tsn", "fusion", "probe")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.name.removesuffix(".toml") for file in files(__name__).iterdir() if file.name.endswith(".toml"))


def configured(
    config: type[Config], kind: str, recipe: str | None, settings: Sequence[str] = (), **given: Any
) -> Config:
    """A configuration from ``recipe`` (a name, or the path of a file), then ``settings``, then what is ``given``.

    A setting is ``name=value``. :class:`RunError` for a recipe, a name or a value that there is not.
    """
    values: dict[str, Any] = dict(_table(recipe, kind)) if recipe else {}
    types = get_type_hints(config)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise RunError(f"no setting {setting!r}; expected name=value, such as lr=0.001")
        if name in given:
            raise RunError(f"{name} is set to {text}, and has an option that says {given[name]}; give one of them")
        values[name] = _parsed(text)
    values |= given
    known = [field.name for field in fields(config)]
    for name in values:
        if name not in known:
            raise RunError(f"{kind} has no setting {name!r}; it has: {', '.join(known)}")
    return config(**{name: _typed(name, value, types[name]) for name, value in values.items()})


def _table(recipe: str, kind: str) -> Mapping[str, Any]:
    if recipe in recipe_names():
        text = (files(__name__) / f"{recipe}.toml").read_text()
    else:
        path = Path(recipe)
        if not path.is_file():
            raise RunError(f"no recipe {recipe!r}; there are {', '.join(recipe_names())}, or give the path of a file")
        text = path.read_bytes().decode(errors="replace")
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{recipe} is not TOML: {error}") from error
    if unknown := sorted(set(tables) - set(_KINDS)):
        raise RunError(
            f"{recipe} has {', '.join(unknown)}; expected tables of the kinds of training: {', '.join(_KINDS)}"
        )
    table = tables.get(kind)
    if not isinstance(table, dict):
        raise RunError(f"{recipe} says nothing of {kind}; expected a table [{kind}]")
    return table


def _parsed(text: str) -> Any:
    """A value as TOML writes it; what is none of its values is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """``value`` as the field's type, where it means the same; :class:`RunError` where it does not."""
    if isinstance(wanted, UnionType):
        if value is None:
            return None
        (wanted,) = (option for option in get_args(wanted) if option is not NoneType)
    if get_origin(wanted) is tuple and isinstance(value, (list, tuple)):
        return tuple(_typed(name, item, get_args(wanted)[0]) for item in value)
    if wanted is float and type(value) is int:
        return float(value)
    if get_origin(wanted) is tuple or type(value) is not wanted:
        what = "a list" if get_origin(wanted) is tuple else _NAMES[wanted]
        raise RunError(f"{name} is {value!r}; expected {what}")
    return value
