"""This node's key of WireGuard: a file that stays, as flannel keeps it.

Source: flannel pkg/backend/wireguard/device.go (44 characters of base64, 0400; $WIREGUARD_KEY_FILE). RFC 7748 (X25519).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from lease.backend_config import WireguardConfig
from lease.model import KEY_SIZE, key_bytes, key_text
from lease.regular import Stamp, stamp
from overlay.control.controller import CannotReconcile, Controller, Waiting
from overlay.control.inputs import CurrentInputs, Inputs
from overlay.node.owned import Owned
from overlay.process.files import remove, text_of, write_atomically
from overlay.process.log import log

CHECK_EVERY_S = 1.0
"""No event reports a file."""
MODE = 0o400


def public_of(private: bytes) -> bytes:
    """The public key of a private one."""
    from nacl.bindings import crypto_scalarmult_base  # 3 MiB that only a wireguard node need hold

    return crypto_scalarmult_base(private)


def new_key() -> bytes:
    """A private key (RFC 7748, 5: clamped)."""
    made = bytearray(os.urandom(KEY_SIZE))
    made[0] &= 248
    made[31] = made[31] & 127 | 64
    return bytes(made)


def write_key(path: str, key: bytes) -> None:
    """Raises OSError."""
    write_atomically(path, key_text(key), MODE)


def read_key(path: str) -> bytes | None:
    """The private key of a file, None: there is none. Raises CannotReconcile: it holds something else; OSError."""
    try:
        text = text_of(path).strip()
    except FileNotFoundError:
        return None
    try:
        key = key_bytes(text)
    except ValueError as error:  # what it holds is not shown
        raise CannotReconcile(
            f"{path} holds no key of WireGuard: {error}; remove it, and a new one is made (peers follow by themselves)"
        ) from None
    if not any(key):
        raise CannotReconcile(f"{path} holds an all-zero key; remove it, and a new one is made")
    return key


class KeyHolder:
    """The private key, for the controller that gives it to the device; the inputs have the public one alone."""

    def __init__(self) -> None:
        self.private = b""


class KeyController(Controller):
    """The key file: made where there is none, read again when somebody writes another (overlay rotate-key)."""

    name = "key"

    def __init__(self, current: CurrentInputs, holder: KeyHolder, owned: Owned, clock: Callable[[], float]) -> None:
        self._current, self._holder, self._owned, self._clock = current, holder, owned, clock
        self._next = 0.0
        self._stamp: Stamp | None = None

    def wants(self, inputs: Inputs) -> object:
        """The file, where the network's backend is wireguard."""
        if inputs.config is None:
            return Waiting("for a network config")
        return inputs.settings.wireguard_key_file if isinstance(inputs.config.backend, WireguardConfig) else None

    def reconcile(self, wants: str) -> bool:
        """Read it. Raises OSError, CannotReconcile; the key of before goes on."""
        self._next = self._clock() + CHECK_EVERY_S
        now = stamp(wants)
        if now is not None and now == self._stamp and self._holder.private:
            return False
        key = read_key(wants)
        if key is None:
            key = self._holder.private or new_key()
            write_key(wants, key)
            log.info("key.made", path=wants)
        if stat.S_IMODE(os.stat(wants).st_mode) & 0o077:
            with suppress(OSError):  # a mount that is read-only
                os.chmod(wants, MODE)
            log.warning(
                "key.mode", path=wants, effect="others could read it; made 0400. overlay rotate-key makes a new one"
            )
        self._stamp = stamp(wants)
        if key != self._holder.private:
            changed = bool(self._holder.private)
            self._holder.private = key
            public = public_of(key)
            self._current.set(public_key=public, published_key=self._current.inputs.published_key or public)
            log.info("key.changed" if changed else "key", public_key=key_text(public))
        return False

    def due(self) -> float | None:
        """Soon."""
        return self._next if self._holder.private else None

    def withdraw(self) -> Iterator[str]:
        """Forget it. At an uninstall (there is no config then) remove the file where it holds a key and stands beside
        subnet.env, where we made it; one elsewhere is the operator's, and where flannel is back it is flannel's."""
        settings, self._stamp = self._current.inputs.settings, None
        path = settings.wireguard_key_file
        self._holder.private = b""
        self._current.set(public_key=b"", published_key=b"")
        beside = os.path.dirname(path) == os.path.dirname(settings.subnet_file)
        if self._current.inputs.config is not None or not beside or self._owned.flannel_has_it():
            return
        with suppress(CannotReconcile, OSError):
            if read_key(path) is not None:
                remove(path)
                yield path

    def status(self) -> Mapping[str, object]:
        """`key`."""
        public = self._current.inputs.public_key
        if not public:
            return {"key": None}
        return {"key": {"public_key": key_text(public), "file": self._current.inputs.settings.wireguard_key_file}}
