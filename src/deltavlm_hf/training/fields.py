"""Fields of a YAML file for a dataclass: what is misspelt, misplaced or of another type is told in its own words."""

import dataclasses
import difflib
import enum
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_CALLED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "fields",
}


class _Loader(yaml.SafeLoader):
    """Reads `1e-5` as a number, as everybody means it, and refuses a field that is given twice."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{name}` is given {names.count(name)} times", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"(?=.*[eE]){_NUMBER.pattern}$"), list("-+.0123456789")
)


def read_yaml(path: str | Path, changes: Sequence[str] = ()) -> Any:
    """
    The content of a YAML file.

    Args:
        path (`str` or `Path`).
        changes (`Sequence[str]`, *optional*): fields to set in it, such as `training.max_steps=10`; of a field in
            fields the name is that of each with dots between them, the value is YAML.

    Raises:
        ValueError: if it is no YAML, or has a field twice, or a change is of another form.
    """
    content = _parse(Path(path).read_text(encoding="utf-8"), path)
    for change in changes:
        names, equals, value = change.partition("=")
        *above, last = names.split(".")
        place = content
        for name in above:
            if isinstance(place, dict) and place.get(name) is None:
                place[name] = {}
            place = place[name] if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict):
            raise ValueError(f"{change!r} sets no field of {path}: expected such as training.max_steps=10.")
        place[last] = _parse(value, f"The value of {change!r}")
    return content


def _parse(text: str, name: str | Path) -> Any:
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is no YAML: {error}") from error


def nearest(name: str, known: Sequence[str]) -> str:
    """`" Did you mean ...?"`, or nothing if no known name is like it."""
    close = difflib.get_close_matches(name, known, 1)
    return f" Did you mean `{close[0]}`?" if close else ""


def fit(kind: type, content: Mapping[str, Any], where: str, elsewhere: Mapping[str, type] | None = None) -> dict:
    """
    Gives values from a file the types that the fields of a dataclass have.

    Args:
        kind (`type`): the dataclass.
        content (`Mapping`): names and values.
        where (`str`): what the place is called in errors.
        elsewhere (`Mapping[str, type]`, *optional*): where misplaced fields may belong, such as "under `data`".

    Raises:
        ValueError: if a name is unknown or a value has another type.
    """
    known = _names(kind)
    unknown = [str(name) for name in content if name not in known]
    if unknown:
        listed = ", ".join(known) if len(known) < 20 else "those of `TrainingArguments` and in docs/training.md"
        hints = []
        for name in unknown:
            places = [place for place, other in (elsewhere or {}).items() if name in _names(other)]
            hints.append(f" `{name}` belongs {places[0]}." if places else nearest(name, known))
        raise ValueError(f"{where} has unknown fields {', '.join(unknown)}; known are: {listed}.{''.join(hints)}")
    expected = typing.get_type_hints(kind)
    return {name: _fit(value, expected[name], f"{where}: `{name}`") for name, value in content.items()}


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.init]


def _fit(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = {typing.get_origin(option) or option for option in options}
    if typing.Any in kinds or (value is None and type(None) in kinds):
        return value
    allowed = next(([each.value for each in kind] for kind in kinds if _is_enum(kind)), None)
    if allowed is not None:
        value = "no" if value is False else value  # as YAML reads `no`
        if value not in allowed:
            raise ValueError(
                f"{where} is {value!r}, expected one of {', '.join(allowed)}.{nearest(str(value), allowed)}"
            )
        return value
    if any(value in typing.get_args(option) for option in options if typing.get_origin(option) is typing.Literal):
        return value
    if isinstance(value, bool):
        fits = bool in kinds
    elif isinstance(value, int | float):
        fits = float in kinds or (int in kinds and float(value).is_integer())
        value = value if float in kinds or not fits else int(value)
    elif isinstance(value, str) and str not in kinds and kinds & {int, float} and _NUMBER.fullmatch(value):
        return _fit(float(value), hint, where)
    else:
        fits = isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))
    if not fits:
        expected = " or ".join(_CALLED[kind] for kind in _CALLED if kind in kinds) or "fields"
        quotes = ", in quotes" if str in kinds and not isinstance(value, list | dict | None) else ""
        raise ValueError(f"{where} is {value!r}, expected {expected}{quotes}.")
    for option in options:
        if isinstance(value, list) and typing.get_origin(option) is list:
            return [_fit(item, typing.get_args(option)[0], f"{where}, item {at}") for at, item in enumerate(value, 1)]
        if isinstance(value, dict) and typing.get_origin(option) is dict:
            return {name: _fit(item, typing.get_args(option)[1], f"{where}, {name}") for name, item in value.items()}
    return value


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)
