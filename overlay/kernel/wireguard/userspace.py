"""WireGuard by a program, wireguard-go, where the kernel has none: for labs. Its socket speaks lines of text.

Source: wireguard.com/xplatform (the userspace API).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from lease.families import FAMILIES
from overlay.kernel.netlink import KernelError
from overlay.kernel.wireguard.device import NO_KEY, Net, Place, WgDevice, WgPeer

PROGRAM = "wireguard-go"
SOCKETS = "/var/run/wireguard"
"""Where the program makes its socket, whatever the network namespace: of two namespaces each needs a folder of its own."""
TUN = "/dev/net/tun"
ANSWER_S, START_S = 5.0, 5.0
MISSING = (
    f"this kernel has no WireGuard, and there is no {PROGRAM}: modprobe wireguard, or (slower, for labs)"
    f" apt-get install {PROGRAM}"
)


def start(name: str, folder: str) -> int:
    """Make a device by the program, which goes on when this process ends, and ends when the device is deleted; its pid.
    folder: for its socket and pid, of this node alone. Raises KernelError."""
    program = shutil.which(PROGRAM)
    if program is None or shutil.which("unshare") is None:
        why = MISSING if program is None else "unshare is missing: apt-get install util-linux"
        raise KernelError(errno.EOPNOTSUPP, why)
    make_tun()
    os.makedirs(folder, mode=0o700, exist_ok=True)
    os.makedirs(SOCKETS, mode=0o755, exist_ok=True)
    path = Path(folder) / f"{name}.sock"
    path.unlink(missing_ok=True)
    script = 'mount --bind "$1" "$2" && exec "$3" -f "$4"'
    own_mounts = ["unshare", "--mount", "--propagation", "private"]
    command = [*own_mounts, "sh", "-c", script, "sh", folder, SOCKETS, program, name]
    environ = {**os.environ, "LOG_LEVEL": "error"}
    quiet = subprocess.DEVNULL
    made = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, env=environ, start_new_session=True)
    end = time.monotonic() + START_S
    while not _listens(str(path)):  # it is there a moment before: who asks then is refused, as by one that is dead
        if made.poll() is not None:
            why = f"{PROGRAM} {name} ended with {made.returncode}: is /dev/net/tun there, and are we root?"
            raise KernelError(errno.EIO, why)
        if time.monotonic() > end:
            made.kill()
            raise KernelError(errno.ETIMEDOUT, f"{PROGRAM} {name} made no socket within {START_S:.0f} s")
        time.sleep(0.01)
    return made.pid


def _connect(made: socket.socket, path: str) -> None:
    """Of a path a socket's address has 108 bytes (unix(7)), and run directories may be deep. Raises OSError."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        made.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)


def _listens(path: str) -> bool:
    """Whether somebody does there."""
    with socket.socket(socket.AF_UNIX) as made:
        made.settimeout(ANSWER_S)
        with contextlib.suppress(OSError):
            _connect(made, path)
            return True
    return False


def make_tun() -> None:
    """A container, or a root file system that was unpacked, may lack the device file (Documentation/networking/tuntap.rst).
    Where it cannot be made the program says so."""
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(TUN), mode=0o755, exist_ok=True)
        os.mknod(TUN, stat.S_IFCHR | 0o666, os.makedev(10, 200))


def running() -> Iterator[int]:
    """The pids of all such programs on this machine."""
    for there in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if there.name.isdecimal() and (there / "comm").read_text().strip() == PROGRAM:
                yield int(there.name)


class UserspaceWireguard:
    """A device of the program. Raises KernelError."""

    program = PROGRAM

    def __init__(self, name: str, folder: str) -> None:
        self._name, self._path = name, f"{folder}/{name}.sock"

    def read(self) -> WgDevice:
        """The device whole. Raises KernelError."""
        return parse(self._ask("get=1\n\n"))

    def set(self, key: bytes, port: int) -> None:
        """Its private key and port. Raises KernelError."""
        self._ask(f"set=1\nprivate_key={key.hex()}\nlisten_port={port}\n\n")

    def put(self, peers: Mapping[bytes, WgPeer | None]) -> None:
        """Peers, by their keys, as they are to be; None: away. Raises KernelError."""
        self._ask("set=1\n" + "".join(lines(key, peer) for key, peer in peers.items()) + "\n")

    def _ask(self, request: str) -> str:
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.settimeout(ANSWER_S)
                _connect(made, self._path)
                made.sendall(request.encode())
                answer = b""
                while not answer.endswith(b"\n\n") and (more := made.recv(1 << 16)):
                    answer += more
        except OSError as error:
            why = f"{PROGRAM} of {self._name} ({self._path}): {error.strerror or error}"
            raise KernelError(error.errno or errno.EIO, why) from error
        text = answer.decode()
        code = next((line.partition("=")[2] for line in text.splitlines() if line.startswith("errno=")), "0")
        if code != "0":
            number = abs(int(code))
            raise KernelError(number, f"{PROGRAM} refuses, for {self._name}: {os.strerror(number)}")
        return text

    def close(self) -> None:
        """Nothing stays open."""


def lines(key: bytes, peer: WgPeer | None) -> str:
    """What puts a peer, or takes it away."""
    if peer is None:
        return f"public_key={key.hex()}\nremove=true\n"
    made = [f"public_key={key.hex()}", f"preshared_key={peer.psk.hex()}"]
    made += [] if peer.adds else ["replace_allowed_ips=true"]
    if peer.place is not None:
        made.append(f"endpoint={_place_text(peer.place)}")
    made.append(f"persistent_keepalive_interval={peer.keepalive_s}")
    made += [f"allowed_ip={_net_text(there)}" for there in sorted(peer.allowed)]
    return "\n".join(made) + "\n"


def parse(text: str) -> WgDevice:
    """What `get=1` answers. Its private key stands in it: never to be shown."""
    key, port, peers = NO_KEY, 0, dict[bytes, WgPeer]()
    now = b""
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name == "private_key":
            key = bytes.fromhex(value)
        elif name == "listen_port":
            port = int(value)
        elif name == "public_key":
            now = bytes.fromhex(value)
            peers[now] = WgPeer(frozenset(), None)
        elif now:
            peers[now] = _with(peers[now], name, value)
    return WgDevice(key, port, peers)


def _with(peer: WgPeer, name: str, value: str) -> WgPeer:
    if name == "preshared_key":
        return peer._replace(psk=bytes.fromhex(value))
    if name == "endpoint":
        return peer._replace(place=_place(value))
    if name == "persistent_keepalive_interval":
        return peer._replace(keepalive_s=int(value))
    return peer._replace(allowed=peer.allowed | {_net(value)}) if name == "allowed_ip" else peer


def _net(text: str) -> Net:
    address, _, length = text.partition("/")
    family = FAMILIES[6 if ":" in address else 4]
    return family.number, int.from_bytes(socket.inet_pton(family.af, address), "big"), int(length)


def _net_text(there: Net) -> str:
    number, base, length = there
    family = FAMILIES[number]
    return f"{socket.inet_ntop(family.af, family.packed(base))}/{length}"


def _place_text(place: Place) -> str:
    family = FAMILIES[place.family]
    address = socket.inet_ntop(family.af, family.packed(place.address))
    return f"{address}:{place.port}" if place.family == 4 else f"[{address}]:{place.port}"


def _place(text: str) -> Place | None:
    host, _, port = text.rpartition(":")
    family = FAMILIES[6 if host.startswith("[") else 4]
    try:
        address = socket.inet_pton(family.af, host.strip("[]").partition("%")[0])
        return Place(family.number, int.from_bytes(address, "big"), int(port))
    except (OSError, ValueError):
        return None
