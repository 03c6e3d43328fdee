"""SHA-256 without OpenSSL."""

from __future__ import annotations

from contextlib import suppress


def sha256(data: bytes) -> str:
    """hashlib's, without hashlib where that can be (as the module random does): it maps OpenSSL, 3.5 MiB for one hash."""
    from importlib import import_module

    for name in ("_sha256", "_sha2", "hashlib"):  # CPython 3.11; 3.12 and later; any
        with suppress(ImportError):
            return str(import_module(name).sha256(data).hexdigest())
    raise ImportError("no SHA-256 in this Python")
