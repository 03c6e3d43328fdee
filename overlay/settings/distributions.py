"""The variables by which distributions' packages start flanneld: in an environment file, as those of Red Hat's family
have it (/etc/sysconfig/flanneld, read by their flanneld-start). flannel's own are FLANNELD_ names, which settings.py reads.
Pure.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

_FLAGS = {
    "etcd-endpoints": ("FLANNEL_ETCD_ENDPOINTS", "FLANNEL_ETCD"),
    "etcd-prefix": ("FLANNEL_ETCD_PREFIX", "FLANNEL_ETCD_KEY"),
}
"""By flag, the variables that name it, the newer one first."""
OPTIONS = "FLANNEL_OPTIONS"
"""Flags, as a shell splits them."""


def flags_of(environ: Mapping[str, str]) -> list[str]:
    """What the packages' start script makes of them: flags, before those of the command line. Raises ValueError: quotes that
    are not closed."""
    found = []
    for flag, names in _FLAGS.items():
        if text := next((environ[name] for name in names if environ.get(name)), ""):
            found.append(f"--{flag}={text}")
    return [*found, *shlex.split(environ.get(OPTIONS, ""))]
