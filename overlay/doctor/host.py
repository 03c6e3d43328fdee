"""The host: kernel, modules, clock, and the programs that see to interfaces beside us (networkd, NetworkManager, udev)."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from overlay.doctor.finding import Finding, Findings, State, ok, unknown

_TIMEX = 208
"""Bytes of struct timex on 64 bits (adjtimex(2)); status at 40, the state is what the call returns."""
_STA_UNSYNC, _TIME_ERROR = 0x40, 5
PROGRAMS_S = 10.0


_OF_BACKEND = {
    "vxlan": ("ip", "link", "add", "ov0", "type", "vxlan", "id", "1", "dstport", "8472", "dev", "lo"),
    "ipip": ("ip", "link", "add", "ov0", "type", "ipip", "local", "127.0.0.1"),
    "wireguard": ("ip", "link", "add", "ov0", "type", "wireguard"),
}


def kernel(backend: str, program: str) -> Findings:
    """Whether it has what a backend needs: tried in a network namespace that nobody uses. program: that encrypts in the
    kernel's place, "": none."""
    release = os.uname().release
    if backend == "wireguard" and program:
        yield Finding(
            "kernel: wireguard",
            State.WARN,
            f"{program} encrypts, since {release} has no WireGuard",
            "it costs several times the kernel's time for each packet",
            f"modprobe wireguard; apt-get install linux-modules-extra-{release}; then restart the agent",
        )
    own = {backend: _OF_BACKEND[backend]} if backend in _OF_BACKEND and not program else {}
    tried = {
        **own,
        "bridge": ("ip", "link", "add", "ov0", "type", "bridge"),
        "veth": ("ip", "link", "add", "ov0", "type", "veth", "peer", "name", "ov1"),
        "nf_tables": ("nft", "add", "table", "ip", "ov"),
        "nf_tables for bridges": (
            "nft",
            "add table bridge ov; add chain bridge ov c { type filter hook prerouting priority 0; }",
        ),
    }
    for name, command in tried.items():
        refusal = _in_new_namespace(command)
        if refusal is None:
            yield ok(f"kernel: {name}", f"{release} has it")
        elif refusal.startswith("no program"):
            yield unknown(f"kernel: {name}", refusal, "apt-get install iproute2 nftables util-linux")
        elif refusal.startswith("unshare:"):
            yield unknown(
                f"kernel: {name}", f"no namespace can be made to try it in: {refusal}", "try it on the host, as root"
            )
        else:
            module = "bridge" if "bridges" in name else name
            why = "pod anti-spoofing needs it" if "bridges" in name else "nothing works without it"
            state = State.WARN if "bridges" in name else State.WRONG
            mend = f"modprobe {module}; apt-get install linux-modules-extra-{release}"
            yield Finding(f"kernel: {name}", state, f"{release}: {refusal}", why, mend, partial(_load, module))


def _in_new_namespace(command: Iterable[str]) -> str | None:
    try:
        done = subprocess.run(
            ["unshare", "--net", *command], capture_output=True, text=True, timeout=PROGRAMS_S, check=False
        )
    except FileNotFoundError:
        return "no program unshare"
    except subprocess.TimeoutExpired:
        return "no answer"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or ["refused without a word"]
    if done.returncode == 127 or ("No such file or directory" in lines[-1] and "unshare" in lines[-1]):
        return f"no program {next(iter(command))}"
    return lines[-1]


def _load(module: str) -> None:
    subprocess.run(["modprobe", module], check=True, timeout=PROGRAMS_S)


def clock() -> Findings:
    """Whether it is kept right: the kernel says so where somebody (chrony, timesyncd, ntpd) disciplines it."""
    subject = "clock"
    made = ctypes.create_string_buffer(_TIMEX)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(made)
    except (OSError, AttributeError):
        state = -1
    if state < 0:
        yield unknown(subject, "the kernel does not say whether it is kept right")
        return
    status = int.from_bytes(made.raw[40:44], "little", signed=True)
    if state == _TIME_ERROR or status & _STA_UNSYNC:
        yield Finding(
            subject,
            State.WARN,
            "nobody keeps this clock right",
            "certificates of etcd and the API server are refused by a wrong clock, and agents do not believe each other's"
            " questions",
            "apt-get install chrony (a virtual machine may have it from its host instead: then this is no fault)",
        )
    else:
        yield ok(subject, "it is kept right")


# --- others who see to interfaces


def networkd(root: Path) -> Findings:
    """systemd-networkd removes routes and rules that it does not know when it (re)starts, unless it is told not to."""
    subject = "systemd-networkd"
    if not _is_host(root):
        yield unknown(subject, _NO_HOST)
        return
    if not (root / "run/systemd/netif/links").is_dir():
        yield ok(subject, "does not run")
        return
    text = _configs(root, "systemd/networkd.conf")
    wrong = [key for key in ("ManageForeignRoutes", "ManageForeignRoutingPolicyRules") if _value(text, key) not in _NO]
    if wrong:
        drop_in = root / "etc/systemd/networkd.conf.d/50-overlay.conf"
        yield Finding(
            subject,
            State.WARN,
            f"runs with {', '.join(wrong)}",
            "when it restarts (an update does that) it removes our routes and those of pods' bridges; we put ours back in a"
            " moment, packets are lost meanwhile",
            f"put [Network] {' '.join(f'{key}=no' for key in wrong)} into /{drop_in.relative_to(root)}",
            lambda: _write(drop_in, "[Network]\n" + "".join(f"{key}=no\n" for key in wrong)),
        )
    else:
        yield ok(subject, "leaves routes of others alone")
    managed = [
        path.name
        for path in _files(root, "systemd/network", "*.network")
        if _matches_all(path.read_text(errors="replace"))
    ]
    if managed:
        yield Finding(
            subject,
            State.WARN,
            f"{', '.join(managed)} is about every interface",
            "it configures pods' veths and the tunnel's device as well, and takes their addresses",
            "give its [Match] a Name or Type that is the underlay's alone",
        )


def _matches_all(text: str) -> bool:
    section = re.search(r"(?ms)^\[Match\]\s*$(.*?)(?=^\[|\Z)", text)
    lines = [line.strip() for line in (section.group(1) if section else "").splitlines()]
    wanted = [line for line in lines if line and line[0] not in "#;"]
    return wanted in (["Name=*"], ["Name=?*"]) or (section is not None and not wanted)


def network_manager(root: Path) -> Findings:
    """NetworkManager takes interfaces that it is not told to leave."""
    subject = "NetworkManager"
    if not _is_host(root):
        yield unknown(subject, _NO_HOST)
        return
    if not (root / "run/NetworkManager").is_dir():
        yield ok(subject, "does not run")
        return
    text = "\n".join(
        path.read_text(errors="replace")
        for folder in ("etc/NetworkManager", "usr/lib/NetworkManager", "run/NetworkManager")
        for path in sorted((root / folder).glob("**/*.conf"))
    )
    left = ",".join(re.findall(r"(?m)^\s*unmanaged-devices\s*[+]?=\s*(.*)$", text))
    missing = [
        name
        for name in ("flannel", "cni", "veth")
        if f"interface-name:{name}" not in left and "interface-name:*" not in left
    ]
    if not missing:
        yield ok(subject, "leaves our interfaces alone")
        return
    path = root / "etc/NetworkManager/conf.d/50-overlay.conf"
    names = ";".join(f"interface-name:{name}*" for name in ("flannel", "cni", "veth"))
    yield Finding(
        subject,
        State.WARN,
        f"is not told to leave interfaces that begin with {', '.join(missing)}",
        "it may take addresses and routes off them, or set them down",
        f"put [keyfile] unmanaged-devices+={names} into /{path.relative_to(root)}; systemctl reload NetworkManager",
        partial(_manage_no_more, path, names),
    )


def _manage_no_more(path: Path, names: str) -> None:
    _write(path, f"[keyfile]\nunmanaged-devices+={names}\n")
    subprocess.run(["nmcli", "general", "reload", "conf"], check=True, timeout=PROGRAMS_S)


def mac_policy(root: Path) -> Findings:
    """udev gives virtual devices another MAC after they were made, where a .link file says so."""
    subject = "MACAddressPolicy"
    if not _is_host(root):
        yield unknown(subject, _NO_HOST)
        return
    for path in _files(root, "systemd/network", "*.link"):
        text = path.read_text(errors="replace")
        if re.search(r"(?m)^\s*MACAddressPolicy\s*=\s*persistent", text) and re.search(
            r"(?m)^\s*(OriginalName|Name)\s*=\s*\*\s*$", text
        ):
            yield Finding(
                subject,
                State.WARN,
                f"{path.name}: udev may change the MAC of a device that was just made",
                "our tunnel's has its MAC from the start, so that udev leaves it; a bridge or veth of the CNI plugin may"
                " change its MAC once, and ARP entries are wrong for a moment",
                "a .link file before it with [Match] OriginalName=cni* veth* and [Link] MACAddressPolicy=none",
            )
            return
    yield ok(subject, "udev leaves MACs as they are")


_NO_HOST = "the host's files cannot be seen from here (a container sees its own): --root where they are mounted"


def _is_host(root: Path) -> bool:
    """Whether a folder is a host's root, not a container's: something began it (init), or keeps its machines' journal."""
    return any(
        (root / each).exists() for each in ("run/systemd/system", "run/systemd/netif", "run/udev", "etc/fstab", "boot")
    )


_NO = ("no", "false", "0", "off")


def _files(root: Path, folder: str, pattern: str) -> list[Path]:
    """By systemd's rule: one in /etc stands for one of its name in /run and /usr/lib."""
    found: dict[str, Path] = {}
    for place in ("usr/lib", "run", "etc"):
        for path in (root / place / folder).glob(pattern):
            found[path.name] = path
    return [path for _, path in sorted(found.items()) if path.is_file()]


def _configs(root: Path, name: str) -> str:
    """A configuration of systemd with its drop-ins, in their order."""
    head = [root / place / name for place in ("usr/lib", "etc") if (root / place / name).is_file()][-1:]
    return "\n".join(path.read_text(errors="replace") for path in [*head, *_files(root, f"{name}.d", "*.conf")])


def _value(text: str, key: str) -> str:
    found = re.findall(rf"(?m)^\s*{key}\s*=\s*(\S+)\s*$", text)
    return found[-1].lower() if found else "yes"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
