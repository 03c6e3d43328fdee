"""A JSON object of a config read field by field, as Go's encoding/json reads it; each refusal names field, value and what is
allowed. Pure."""

from __future__ import annotations

import json
from typing import Any, TypeVar

_T = TypeVar("_T")


class ConfigError(ValueError):
    """The network config is wrong. The message names field, value and what is allowed."""


class Fields:
    """A JSON object read as Go's encoding/json reads it: key names in any case, unknown ones ignored, null = absent."""

    def __init__(self, where: str, value: dict[str, Any]) -> None:
        self._where = where
        self._names = list(value)
        self._values = {key.lower(): item for key, item in value.items() if item is not None}

    def get(self, name: str, kind: type[_T], default: _T) -> _T:
        """A field of that kind; the default where it is absent. Raises ConfigError."""
        value = self._values.get(name.lower(), default)
        if type(value) is not kind:  # bool is an int to Python, not to Go
            raise ConfigError(f"{self._where}{name}: {show(value)} must be {_KINDS[kind]}")
        return value

    def secret(self, name: str) -> str:
        """A text that no message shows, "" where it is absent. Raises ConfigError."""
        value = self._values.get(name.lower(), "")
        if type(value) is not str:
            raise ConfigError(f"{self._where}{name}: it must be {_KINDS[str]} (not shown: it is a secret)")
        return value

    def part(self, name: str) -> Fields | None:
        """An object within, None where it is absent; secrets may stand in it. Raises ConfigError."""
        value = self._values.get(name.lower())
        if value is not None and type(value) is not dict:
            raise ConfigError(f"{self._where}{name}: it must be {_KINDS[dict]}, not {type(value).__name__}")
        return None if value is None else Fields(f"{name}.", value)

    def whole(self, name: str, low: int, high: int, default: int) -> int:
        """A whole number from low to high. Raises ConfigError."""
        value = self.get(name, int, default)
        if name.lower() in self._values and not low <= value <= high:
            raise ConfigError(f"{self._where}{name}: {show(value)} must be a whole number from {low} to {high}")
        return value

    def has(self, name: str) -> bool:
        """Whether it is there."""
        return name.lower() in self._values

    def unknown(self, known: frozenset[str]) -> list[str]:
        """A line for each name that is none of those."""
        return [
            f"{self._where}{cut(name)}: no such field (ignored)" for name in self._names if name.lower() not in known
        ]


_KINDS: dict[type, str] = {int: "a whole number", bool: "true or false", str: "a string", dict: "an object {...}"}


def show(value: object) -> str:
    """A value for a message: recognisable, never longer than a line."""
    return cut(json.dumps(value, ensure_ascii=True, default=repr))


def cut(text: str) -> str:
    """Text for a message, in ASCII, at most 60 characters."""
    text = ascii(text)[1:-1] if not text.isascii() or not text.isprintable() else text
    return text if len(text) <= 60 else text[:57] + "..."
