"""One CycloneDX document of cyclonedx-py's and a list of Debian packages: `sbom_merge.py VERSION PYTHON DEBIAN`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from urllib.parse import quote


def main() -> None:
    version, python, debian = sys.argv[1:]
    made = json.loads(Path(python).read_text())
    components = made.setdefault("components", [])
    for line in Path(debian).read_text().splitlines():
        name, its_version, architecture = line.split(" ")
        purl = f"pkg:deb/debian/{quote(name)}@{quote(its_version)}?arch={architecture}"
        components.append({"type": "library", "bom-ref": purl, "name": name, "version": its_version, "purl": purl})
    made["metadata"] = made.get("metadata", {}) | {
        "component": {"type": "container", "bom-ref": "overlayd", "name": "overlayd", "version": version}
    }
    json.dump(made, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
