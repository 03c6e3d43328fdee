"""Which refused record a target would be of. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lease.model import prefix
from lease.records.codec import key_subnet


def refused_record(found: Mapping[str, Any], target: str) -> str | None:
    """One line about the record that names a target (a node, an address, a subnet) or whose subnet holds it; None: there is
    none. found: the agent's status."""
    word = re.compile(rf"(?<![\w.:-]){re.escape(target)}(?![\w:-]|\.\d)")
    for record in found["refused_records"]:
        key, reason = record["key"], record["reason"]
        of_key = key.rpartition("/")[2]
        if target in (key, of_key) or word.search(reason) or _holds(of_key, target):
            return f"record {key} is refused, so that this node does not know it as a peer: {reason}"
    return None


def _holds(key: str, target: str) -> bool:
    with suppress(ValueError):
        asked = prefix(target)
        subnet = key_subnet(key, asked.family)
        return subnet is not None and subnet.holds(asked.base) and subnet.length <= asked.length
    return False
