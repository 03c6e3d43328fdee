"""Objects of any resource as they are listed and as they change: values, without the way to the server (watch.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Resource(NamedTuple):
    """A kind of object. name: for messages and events; path: `/api/v1/namespaces`; decode: an object, as JSON was read, into
    what is kept of it, raising ValueError with the reason where that cannot be."""

    name: str
    path: str
    decode: Callable[[Mapping[str, Any]], Any]


class Unusable(NamedTuple):
    """In place of an object that cannot be used: why."""

    reason: str


class Listed(NamedTuple):
    """All objects of a resource, by `namespace/name` (`name` where it has no namespace)."""

    resource: str
    revision: int
    items: dict[str, Any]


class Changed(NamedTuple):
    """What changed since the last Listed or Changed; None: deleted."""

    resource: str
    revision: int
    items: dict[str, Any]
