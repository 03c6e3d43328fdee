"""Keys and certificates for a test, by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def openssl(folder: Path, command: str) -> None:
    """Run `openssl COMMAND` in a folder; a test that has none fails with the line that installs it."""
    try:
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.fail("openssl is missing: apt-get install openssl", pytrace=False)


def authority(folder: Path) -> None:
    """ca.key and ca.crt."""
    openssl(folder, "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -subj /CN=overlay-test -days 9")


def request(folder: Path, name: str) -> None:
    """NAME.key and NAME.csr."""
    openssl(folder, f"req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}")
