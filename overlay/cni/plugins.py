"""The CNI plugins that our network list names, put where a container runtime looks for them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

PLUGINS = ("bridge", "host-local", "portmap", "loopback")
PLUGIN_PLACES = ("/usr/lib/cni", "/opt/cni/bin")


def install_plugins(source: str, target: str) -> dict[str, str]:
    """Copy the plugins we use to where there is none, each to a temporary name, then renamed; what was done with each.

    Raises OSError: a plugin is in neither place, or cannot be written.
    """
    done = {}
    places = [Path(source)] if source else [Path(place) for place in PLUGIN_PLACES]
    for name in PLUGINS:
        there = Path(target) / name
        if os.access(there, os.X_OK):
            done[name] = "the host has one; it stays"
            continue
        found = next((place / name for place in places if os.access(place / name, os.X_OK)), places[0] / name)
        temporary = there.with_name(f".{name}.{os.getpid()}")
        there.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(found, temporary)
            temporary.chmod(0o755)
            os.replace(temporary, there)
        finally:
            temporary.unlink(missing_ok=True)
        done[name] = f"copied from {found}"
    return done
