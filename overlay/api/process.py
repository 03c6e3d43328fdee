"""What the metrics say of this process, of the tunnel's traffic and of the subnet's use: read when they are asked for."""

from __future__ import annotations

import os
import re
import resource
import time

from overlay.api.metrics import Process, Traffic

CNI_DATA_DIR = "/var/lib/cni/networks"
"""host-local's own."""
_ADDRESS = re.compile(r"[0-9]+(\.[0-9]+){3}")


def process() -> Process:
    """Of this one, by proc(5)."""
    with open("/proc/self/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    since_boot = int(fields[19]) / ticks
    started_at = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot
    cpu_s = (int(fields[11]) + int(fields[12])) / ticks
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    open_fds = len(os.listdir("/proc/self/fd"))
    return Process(cpu_s, int(fields[21]) * page, int(fields[20]), open_fds, limit, started_at)


def traffic(device: str) -> Traffic | None:
    """Of a device of this network namespace; None where there is none of that name."""
    with open("/proc/self/net/dev", encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, numbers = line.partition(":")
            if name.strip() == device:
                counts = [int(number) for number in numbers.split()]
                return Traffic(device, _four(counts[:8]), _four(counts[8:]))
    return None


def _four(counts: list[int]) -> tuple[int, int, int, int]:
    return counts[0], counts[1], counts[2], counts[3]


def used_addresses(data_dir: str, network: str) -> int | None:
    """How many addresses host-local gave: it has a file for each, by its address; None where its folder cannot be read."""
    try:
        names = os.listdir(f"{data_dir or CNI_DATA_DIR}/{network}")
    except OSError:
        return None
    return sum(1 for name in names if _ADDRESS.fullmatch(name))
