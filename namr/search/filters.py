"""Filters: which items may be found, by their label and their fields. As data, so that JSON can say it:

    {"brand": "x", "price": {"min": 1, "max": 5}, "label": {"in": ["cat", "dog"]}, "note": null}

Every condition has to hold. A value stands for itself and null for no value; {"in": [...]} is one of these,
{"min": ..., "max": ...} is between both or beyond one, bounds included. Numbers are compared by value,
whole or not; text by code points.

Not covered: conditions of which one is enough, parts of text, and finding the items (`items`).
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from namr.errors import ConfigError
from namr.store.item_files import AnyOf, Between, Condition, Kind, Scalar

LABEL = "label"
Filter = Mapping[str, Condition]
"""conditions by field; the label is `LABEL`"""

_OPERATORS = '{"in": [...]}, {"min": ...}, {"max": ...} or {"min": ..., "max": ...}'
_EXPECTED = {"text": "text", "number": "a finite number", "boolean": "true or false"}


def parse(given: object, kinds: Mapping[str, Kind]) -> Filter:
    """The filter in what a caller gave; `kinds` of all fields that the items have.

    ConfigError for what is no filter: an unknown field, a value of another kind, an unknown operator.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f'filter is {_shown(given)}; expected conditions by field, as {{"label": "cat"}}')
    known: dict[str, Kind] = {**kinds, LABEL: "text"}
    return {name: _condition(name, wanted, known) for name, wanted in given.items()}


def _condition(name: str, wanted: Any, known: Mapping[str, Kind]) -> Condition:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"perhaps you meant {near[0]!r}" if near else f"expected one of {', '.join(sorted(known))}"
        raise ConfigError(f"filter: no item of this release has a field {_shown(name)}: {hint}")
    kind = known[name]
    if kind == "mixed":
        raise ConfigError(
            f"filter: field {name!r} can't be filtered by: it holds values of several kinds, text in one "
            "image and a number in another; pack it with one kind"
        )
    if not isinstance(wanted, Mapping):
        return AnyOf((_value(name, wanted, kind),))
    if set(wanted) == {"in"}:
        if not isinstance(wanted["in"], list | tuple):
            raise ConfigError(f"filter: {name}.in is {_shown(wanted['in'])}; expected a list of values")
        return AnyOf(tuple(_value(f"{name}.in", value, kind) for value in wanted["in"]))
    if wanted and set(wanted) <= {"min", "max"}:
        if kind == "boolean":
            raise ConfigError(f"filter: {name!r} is true or false and has no min and max; give the value")
        return Between(*(_value(f"{name}.{end}", wanted.get(end), kind) for end in ("min", "max")))
    raise ConfigError(f"filter: {name} is {_shown(dict(wanted))}; expected a value, null, {_OPERATORS}")


def _value(place: str, value: Any, kind: Kind) -> Scalar:
    """A value that columns of this kind can be compared with."""
    is_fine = value is None
    if kind == "text":
        is_fine |= isinstance(value, str) and _is_unicode(value)
    elif kind == "number":
        is_fine |= isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    else:
        is_fine |= isinstance(value, bool)
    if not is_fine:
        raise ConfigError(f"filter: {place} is {_shown(value)}; expected {_EXPECTED[kind]}")
    scalar: Scalar = value
    return scalar


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character
        return False
    return True


def _shown(value: object) -> str:
    return f"{value!a:.80}"
