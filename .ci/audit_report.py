"""What pip-audit found, in lines: `audit_report.py PINS FOUND SAID`. Ends with 1 where a package has a known fault."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

AWAY = re.compile(
    r"ConnectionError|ConnectTimeout|ReadTimeout|timed out|max retries|name resolution|service unavailable|ServiceError",
    re.IGNORECASE,
)
"""Words of a service that is not there, as pip-audit and requests have them."""


def main() -> int:
    pins, found, said = sys.argv[1:]
    try:
        packages = json.loads(Path(found).read_text())["dependencies"]
    except (OSError, ValueError, KeyError):
        words = Path(said).read_text().strip()
        last = (words.splitlines() or ["nothing, within its time"])[-1]
        if words and not AWAY.search(last):  # a hash that differs, a file that it cannot read
            print(f"audit {pins}: FAILED: {last}")
            return 1
        print(f"audit {pins}: NOT DONE, the service cannot be asked: {last}")
        return 0
    asked = [package for package in packages if "skip_reason" not in package]
    faulty = [(package, fault) for package in asked for fault in package["vulns"]]
    for package, fault in faulty:
        better = ", ".join(fault.get("fix_versions") or []) or "none yet"
        print(f"audit {pins}: {package['name']} {package['version']}: {fault['id']}; mended in: {better}")
    if not asked:
        print(
            f"audit {pins}: NOT DONE, the service knows none of {len(packages)} packages (a mirror without advisories?)"
        )
    elif len(asked) < len(packages):
        print(f"audit {pins}: the service does not know {len(packages) - len(asked)} of {len(packages)} packages")
    if asked and not faulty:
        print(f"audit {pins}: {len(asked)} packages, no known fault")
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main())
