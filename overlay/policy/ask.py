"""Asks a node's agent for all that it knows of policies."""

from __future__ import annotations

import json

from overlay.api.serve import SOCKET_NAME, ask_unix
from overlay.policy.snapshot import Snapshot, from_json


class NotTold(Exception):
    """The agent answered, in one line, that it cannot."""


def ask_policies(run_dir: str) -> Snapshot:
    """Raises OSError: no agent answers there; NotTold; LookupError, TypeError or ValueError: its answer is of another
    version."""
    code, body = ask_unix(f"{run_dir}/{SOCKET_NAME}", "/policy")
    if code != 200:
        raise NotTold(body.strip())
    return from_json(json.loads(body))
