"""The recordings of running flannels, taken apart: data for golden tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "recordings"
FILES = sorted(path.name for path in FOLDER.glob("*.txt"))


class Recording(NamedTuple):
    name: str
    config: str
    keys: dict[str, bytes]
    sections: dict[str, str]


def read(name: str) -> Recording:
    text = (FOLDER / name).read_text()
    config = re.search(r"net-conf: (\{.*\})", text)
    assert config is not None, name
    keys = {
        key.rpartition("/")[2]: value.encode()
        for key, value in re.findall(r"^(/coreos.com/network/subnets/\S+)\n    (\{.*\})$", text, re.MULTILINE)
    }
    sections = dict(re.findall(r"^### (.*)\n((?:(?!### ).*\n?)*)", text, re.MULTILINE))
    return Recording(name, config[1], keys, sections)
