"""Faults and their figures: a node's state as one picture, what a fault cost and how long it lasted, as a row of a table."""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from lease.families import FAMILIES, Family
from overlay.lab import matrix
from overlay.lab.matrix import End
from tests.support.wait import until
from tests.support.world import Agent, World

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- made by `make faults`: begin -->", "<!-- end -->"
GAP_S = 0.01
"""Between two datagrams of the stream that counts what is lost."""
DEVICES = {4: "flannel.1", 6: "flannel-v6.1"}
_SYSCTLS = {
    4: ("ipv4/ip_forward", "ipv4/conf/flannel.1/forwarding", "ipv6/conf/flannel.1/accept_ra"),
    6: ("ipv6/conf/all/forwarding", "ipv6/conf/flannel-v6.1/accept_ra"),
}
"""The forwarding of one device is IPv4's: of IPv6 the kernel asks conf.all alone (net/ipv6/ip6_output.c, ip6_forward)."""
_REMEMBERED = re.compile(r"\tset (?:unknown_senders|beside_sources) \{.*?\n\t\}", re.DOTALL)
"""Written by the rules themselves."""
_ELEMENTS = re.compile(r"elements = \{\s*(.*?)\s*\}")


class Row(NamedTuple):
    """A fault: what, how it is injected, what was lost, seconds until all was as it should be again."""

    area: str
    fault: str
    how: str
    lost: str
    whole_s: float | None

    def line(self) -> str:
        """As a row of a Markdown table."""
        took = "" if self.whole_s is None else f"{self.whole_s:.2f} s" if self.whole_s < 10 else f"{self.whole_s:.0f} s"
        return f"| {self.fault} | {self.how} | {self.lost} | {took} |"


def picture(world: World, agent: Agent) -> dict[str, Any]:
    """All that the agent keeps on its node, of each family of the network: kernel, rules, files."""
    node = agent.node
    halves = {number: _half(world, node, FAMILIES[number]) for number in world.families}
    rules = _REMEMBERED.sub("", world.run(node, "nft", "-s", "list", "ruleset"))
    sysctls = [f"/proc/sys/net/{name}" for number in world.families for name in _SYSCTLS[number]]
    return {
        **{name: {number: half[name] for number, half in halves.items()} for name in next(iter(halves.values()))},
        "rules": sorted(_ELEMENTS.sub(lambda found: str(sorted(found[1].split(", "))), rules).split("\n")),
        "files": {
            path.name: path.read_text()
            for path in (agent.run_dir / "subnet.env", agent.run_dir / "cni/10-flannel.conflist")
        },
        "sysctls": world.run(node, "sh", "-c", f"cat {' '.join(sysctls)} 2>&1"),
    }


def _half(world: World, node: str, family: Family) -> dict[str, Any]:
    """What is a family's own."""
    name = DEVICES[family.number]
    kernel, device, index = world.kernel(node, family=family), world.device(node, name), world.index(node, name)
    address = json.loads(
        world.run(node, "ip", "-j", f"-{family.number}", "addr", "show", "dev", name, "scope", "global")
    )
    return {
        "routes": {
            key: route._replace(oif=0 if route.oif == index else route.oif) for key, route in kernel["routes"].items()
        },
        "neighbours": kernel["neighbours"],
        "fdb": kernel["fdb"],
        "device": device._replace(ifindex=0) if device is not None else None,
        "addresses": sorted(a["local"] for link in address for a in link.get("addr_info", []) if "local" in a),
    }


def alike(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two pictures are one. Raises AssertionError with what differs."""
    differing = {name: (before[name], now[name]) for name in before if before[name] != now[name]}
    if "rules" in differing:
        was, are = Counter(before["rules"]), Counter(now["rules"])
        differing["rules"] = list((was - are).elements()), list((are - was).elements())
    assert not differing, differing
    return True


class Scene:
    """Two nodes with pods that talk all the time, and a table to write into."""

    def __init__(self, world: World, area: str, table: list[Row]) -> None:
        self.world, self.area, self.table = world, area, table
        self.agents: list[Agent] = []
        self.pods: list[End] = []
        """One on each of the first two nodes, by its address of the network's last family."""
        self._ends: list[list[End]] = []
        self.lost_by_family: dict[int, int] = {}
        """Of the last fault."""

    def begin(self, *flags: str, count: int = 2) -> Scene:
        """Agents on nodes, a pod on each of the first two, which have talked."""
        self.agents = self.world.nodes(count, *flags)
        self._ends = [self.world.pod_ends(agent, "pod") for agent in self.agents[:2]]
        self.pods = [ends[-1] for ends in self._ends]
        words = "nft", "list", "set", "bridge", "overlay-1-pods", "ports6"
        for agent in self.agents[:2]:
            until("its pod is bound", lambda a=agent: "elements" in self.world.run(a.node, *words))
        until("pods' addresses are settled", self._all_seen)
        return self

    def _all_seen(self) -> bool:
        """On Kubernetes what flannel's own CNI list attaches is masqueraded when it leaves a node."""
        with matrix.Wires([end for ends in self._ends for end in ends]) as wires:
            return all(cell.seen for cell in wires.all())

    def row(self, fault: str, how: str, lost: str, whole_s: float | None) -> None:
        """Into the table."""
        self.table.append(Row(self.area, fault, how, lost, whole_s))

    def idle_cost(self, seconds: float) -> tuple[float, int]:
        """CPU of the first agent, in shares of one core, and lines it logs, in so many seconds."""
        pid, lines = self.agents[0].process.pid, len(self.agents[0].log().splitlines())
        before = cpu_s(pid)
        time.sleep(seconds)
        return (cpu_s(pid) - before) / seconds, len(self.agents[0].log().splitlines()) - lines

    def suffer(
        self,
        fault: str,
        how: str,
        inject: Callable[[], object],
        bites: Callable[[], object],
        within_s: float = 30.0,
        recover: Callable[[], object] = lambda: None,
        whole: Callable[[], object] | None = None,
    ) -> int:
        """Inject a fault under traffic, see that it bites, end its cause, wait until all is as before; how many packets were
        lost, of two streams that cross, in each family. Time counts from the end of its cause where it has one, else from the
        injection."""
        before = picture(self.world, self.agents[0])
        same = whole or (lambda: alike(before, picture(self.world, self.agents[0])))
        pairs = [pair for one, two in zip(*self._ends, strict=True) for pair in ((one, two), (two, one))]
        with ExitStack() as stack:
            streams = [stack.enter_context(self.world.stream(*pair, GAP_S)) for pair in pairs]
            until("they talk", lambda: all(stream.came for stream in streams))
            began = time.monotonic()
            inject()
            until(f"{fault}: it bites", bites, 60, 0.002)
            if recover():
                began = time.monotonic()
            until(f"{fault}: all is as before", same, within_s)
            took = time.monotonic() - began
            seen = [len(stream.came) for stream in streams]
            until("they talk again", lambda: all(len(s.came) > was + 20 for s, was in zip(streams, seen, strict=True)))
        self.lost_by_family = {
            family: streams[2 * n].lost() + streams[2 * n + 1].lost() for n, family in enumerate(self.world.families)
        }
        lost = sum(self.lost_by_family.values())
        self.row(fault, how, "nothing" if not lost else f"{lost} packets of {100 * len(pairs)} a second", took)
        return lost


def cpu_s(pid: int) -> float:
    """utime + stime, without children: nft's own are not the agent's loop."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def write(table: list[Row]) -> None:
    """The table into docs/reliability.md, an area at a time, in the order in which they came."""
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    lines = []
    for area in dict.fromkeys(row.area for row in table):
        lines += [f"### {area}", "", "| fault | how | lost | whole again after |", "|---|---|---|---|"]
        lines += [row.line() for row in table if row.area == area] + [""]
    PAGE.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{tail}")


def asked_for() -> bool:
    """Whether the page is to be written (`make faults`)."""
    return bool(os.environ.get("OVERLAY_FAULT_TABLE"))
