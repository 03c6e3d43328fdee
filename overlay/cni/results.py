"""What CNI gave to pods, as the runtime's library keeps it: which addresses are behind a veth of the node, and whose.

Source: containernetworking/cni libcni/api.go (cachedInfo: a file for each attachment), CNI specification (results).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from lease.model import ip_number, mac_number
from lease.regular import content


class CniResult(NamedTuple):
    """Of one attachment. mac: of the node's end, 0 where the plugin did not say; addresses: by family; pod:
    `namespace/name`, "" where the runtime is not Kubernetes'; inside: the MACs of the pod's end."""

    mac: int
    addresses: Mapping[int, frozenset[int]]
    pod: str
    inside: frozenset[int] = frozenset()


Lookup = Callable[[str, int], CniResult | None]
"""What is behind the node's end of that name and MAC; None where nothing says."""


class CniResults:
    """Those of a folder, read as they come."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._read: dict[str, tuple[int, dict[str, CniResult]]] = {}
        """By file: what shows whether it was written since (time, size, inode), and its results by the name of the node's
        end."""

    def refreshed(self) -> Lookup:
        """What they say now, of one node's end after another: each is a look at every file otherwise."""
        self._refresh()
        by_name: dict[str, list[CniResult]] = {}
        for _, results in self._read.values():
            for name, result in results.items():
                by_name.setdefault(name, []).append(result)

        def of(interface: str, mac: int) -> CniResult | None:
            return next((each for each in by_name.get(interface, ()) if each.mac in (0, mac)), None)

        return of

    def every(self) -> list[CniResult]:
        """All there are now."""
        self._refresh()
        return [result for _, results in self._read.values() for result in results.values()]

    def _refresh(self) -> None:
        try:
            with os.scandir(self._folder) as entries:
                names = [entry.name for entry in entries]
        except OSError:
            names = []
        there: dict[str, int] = {}
        for name in names:
            with suppress(OSError):  # it went meanwhile
                seen = os.lstat(f"{self._folder}/{name}")
                there[name] = hash((seen.st_mtime_ns, seen.st_size, seen.st_ino))
        self._read = {name: known for name, known in self._read.items() if name in there}
        for name, written in there.items():
            if name not in self._read or self._read[name][0] != written:
                try:
                    self._read[name] = written, self._parsed(f"{self._folder}/{name}")
                except OSError:  # it went, or there is no descriptor for it now: read the next time
                    self._read.pop(name, None)

    @staticmethod
    def _parsed(path: str) -> dict[str, CniResult]:
        """Raises OSError."""
        try:
            return parse(json.loads(content(path)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}


def parse(cached: Any) -> dict[str, CniResult]:
    """A cached attachment, by the name of the node's end. Raises ValueError, KeyError, TypeError or AttributeError."""
    result = cached["result"]
    names = dict(cached.get("cniArgs") or ())
    pod = f"{names.get('K8S_POD_NAMESPACE', '')}/{names['K8S_POD_NAME']}" if names.get("K8S_POD_NAME") else ""
    found: dict[int, set[int]] = {4: set(), 6: set()}
    for each in result["ips"]:
        address = each["address"].partition("/")[0]
        family = 6 if ":" in address else 4
        found[family].add(ip_number(address, family))
    addresses = {family: frozenset(those) for family, those in found.items()}
    inside = frozenset(
        mac_number(each["mac"]) for each in result["interfaces"] if each.get("sandbox") and each.get("mac")
    )
    # of the node's are the bridge and the veth: who looks for a name looks for that of a veth
    ours = [each for each in result["interfaces"] if not each.get("sandbox")]
    return {
        each["name"]: CniResult(mac_number(each["mac"]) if each.get("mac") else 0, addresses, pod, inside)
        for each in ours
    }
