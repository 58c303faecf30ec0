"""Checks of parameters, each with the one sentence that a user reads when it fails."""

import math
import re
from collections.abc import Sequence
from typing import Any


def name_and_number(text: str) -> tuple[str, float]:
    """'name(number)' -> (name, number); 'name' -> (name, 0)."""
    match = re.fullmatch(r"(\w+)(?:\(([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\))?", text)
    return (match[1], float(match[2] or 0)) if match else (text, math.nan)


def one_of(key: str, value: str, allowed: Sequence[str]) -> str:
    """Raise unless value is one of `allowed`, where 'name(x)' stands for name(positive number)."""
    name, amount = name_and_number(value) if isinstance(value, str) else (value, 0.0)
    for choice in allowed:
        wants_number = choice.endswith(")")
        if name == choice.partition("(")[0] and (amount > 0 if wants_number else value == choice):
            return value
    raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}.")


def in_range(key: str, value: float, low: float, high: float) -> None:
    """Raise unless value is a number (no bool, no NaN) in [low, high]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        bounds = f"in [{low:g}, {high:g}]" if high < math.inf else f"at least {low:g}"
        raise ValueError(f"{key} must be a number {bounds}, got {value!r}.")


def whole(key: str, value: Any, low: int) -> None:
    """Raise unless value is a whole number (no bool) of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{key} must be a whole number of at least {low}, got {value!r}.")


def whole_up_to(key: str, value: Any, low: int, most: int, of: str) -> None:
    """Raise unless value is a whole number (no bool) from `low` to `most`, which is the number of what `of` names."""
    whole(key, value, low)
    if value > most:
        raise ValueError(f"{key} must be at most {most}, the number of {of}, got {value}.")


def true_or_false(key: str, value: Any) -> None:
    """Raise unless value is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}.")


def listed(key: str, value: Any) -> tuple[Any, ...]:
    """The items of a list or tuple; raise for anything else."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key} must be a list, got {value!r}.")
    return tuple(value)
