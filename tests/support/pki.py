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


EXPIRED = "-startdate 20250101000000Z -enddate 20250102000000Z"


def signed(folder: Path, name: str, out: str, address: str, dates: str, ca: str = "ca") -> None:
    """OUT, of NAME.csr and signed by CA.crt, for that address. dates: as `openssl ca` takes them."""
    (folder / "ca.conf").write_text(
        "[ca]\ndefault_ca=c\n[c]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\n"
        f"x509_extensions=e\nunique_subject=no\n[p]\ncommonName=supplied\n[e]\nsubjectAltName=IP:{address}\n"
    )
    (folder / "index").touch()
    if not (folder / "serial").exists():
        (folder / "serial").write_text("01\n")
    files = f"-cert {ca}.crt -keyfile {ca}.key -in {name}.csr -out {out}"
    openssl(folder, f"ca -batch -config ca.conf -notext {files} {dates}")
