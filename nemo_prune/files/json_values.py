"""Dataclasses to JSON values and back, checked strictly on the way back."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def to_json(value: object) -> Any:
    """A value as JSON: dataclasses and mappings become objects, sequences become arrays.

    Raises:
        TypeError: JSON has no such value.
    """
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def from_json(kind: Any, value: object, where: str = "", only_known: bool = True) -> Any:
    """A value of a type from the JSON values that :func:`to_json` made of it.

    Args:
        kind: a dataclass, a NamedTuple, or a type made of ``Mapping``, ``dict``, ``tuple``, ``list``, ``Literal``,
            unions, ``str``, ``int``, ``float``, ``bool`` and None.
        value: JSON values.
        where: the value's name, for the messages.
        only_known: whether to refuse keys that the dataclass does not have, instead of skipping them.

    Raises:
        ValueError: the value is not of that type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in (Any, object):
        return value
    if origin in (Union, UnionType):
        return _first_fitting(arguments, value, where, only_known)
    if origin is Literal:
        if value in arguments:
            return value
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return _dataclass_from(kind, value, where, only_known)
    elif hasattr(kind, "_fields"):
        if isinstance(value, list) and len(value) == len(kind._fields):
            hints = get_type_hints(kind)
            return kind(*(from_json(hints[name], each, where) for name, each in zip(kind._fields, value, strict=True)))
    elif origin in (dict, Mapping):
        if isinstance(value, dict):
            key_kind, each_kind = arguments
            return {
                _key(key_kind, key, where): from_json(each_kind, each, _inside(where, key), only_known)
                for key, each in value.items()
            }
    elif origin in (tuple, list, Sequence):
        if isinstance(value, list):
            return (list if origin is list else tuple)(
                from_json(arguments[0], each, _inside(where, place), only_known) for place, each in enumerate(value)
            )
    elif _is_plain(kind, value):
        return value
    raise ValueError(f"`{where or 'it'}` is {_shown(value)}, expected {_named(kind)}")


def _dataclass_from(kind: Any, value: dict, where: str, only_known: bool) -> Any:
    hints = get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}
    if only_known and (unknown := sorted(value.keys() - known.keys())):
        raise ValueError(f"`{_inside(where, unknown[0])}` is not known")
    required = {
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := [name for name in known if name in required and name not in value]:
        raise ValueError(f"`{_inside(where, missing[0])}` is missing")
    return kind(
        **{
            name: from_json(hints[name], value[name], _inside(where, name), only_known)
            for name in known
            if name in value
        }
    )


def _first_fitting(kinds: Sequence[Any], value: object, where: str, only_known: bool) -> Any:
    errors = []
    for kind in kinds:
        try:
            return from_json(kind, value, where, only_known)
        except ValueError as error:
            errors.append(error)
    # The error of the richest type says most.
    raise max(errors, key=lambda error: len(str(error)))


def _is_plain(kind: Any, value: object) -> bool:
    if kind in (None, NoneType):
        return value is None
    # In Python a bool is an int; an int may stand for a float.
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        # JSON has whole numbers of any size; arithmetic with those that no float holds would fail later.
        return isinstance(value, float) or (isinstance(value, int) and abs(value) <= sys.float_info.max)
    return isinstance(value, kind)


def _key(kind: Any, key: str, where: str) -> Any:
    if kind is int:
        if not (key.isascii() and key.isdigit()):
            raise ValueError(f"`{_inside(where, key)}` is not a whole number")
        return int(key)
    return key


def _inside(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _shown(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _named(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")
