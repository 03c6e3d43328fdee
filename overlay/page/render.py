"""The page as one file: its data inside, nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

_HEAD = "<head>"


def render(cluster: Mapping[str, Any]) -> str:
    """The HTML of a cluster (cluster.cluster). Names in it are data: none can end the script that holds them."""
    page, script = _parts()
    data = json.dumps(cluster).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return page.replace("/*DATA*/", data, 1).replace("/*SCRIPT*/", script, 1)


def policy() -> str:
    """The Content-Security-Policy: our own script alone runs, and asks this server alone."""
    digest = base64.b64encode(hashlib.sha256(_parts()[1].encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@lru_cache(maxsize=1)
def _parts() -> tuple[str, str]:
    folder = files("overlay.page")
    page = (folder / "page.html").read_text(encoding="utf-8")
    return page, (folder / "page.js").read_text(encoding="utf-8")
