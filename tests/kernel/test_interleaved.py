"""Everything at once, on a real kernel, against a model: records that dispute, lists that missed events, what others do to the
kernel, refusals, a device that falls, an agent that is killed within a batch. The end is what the plain rule says, always."""

from __future__ import annotations

import errno
import random
import subprocess
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from lease.families import V4
from lease.model import Lease, ip_number, ip_text, mac_text, prefix
from lease.records.packed import Leases
from overlay.backends.base import Outer
from overlay.firewall import guard as guards
from overlay.firewall.guard import Guard
from overlay.firewall.let_in import GRACE_S
from overlay.kernel.events import RouteSeen
from overlay.kernel.netlink import KernelError, Refusal, RequestSocket
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.kernel.route.fast import FDB, NEIGHBOURS, ROUTES
from overlay.kernel.route.link_wire import VxlanDevice
from overlay.kernel.route.links import Links
from overlay.peers.datapath import Datapath
from overlay.peers.plan import entries
from tests.support.clock import Clock
from tests.support.make import OWN_MAC, lease, node
from tests.support.tunnel import TunnelNews
from tests.unit.test_peers import by_the_plain_rule

NODE = node()
TABLE = guards.table(V4, 1, Outer(17, 8472, 1), guards.Where(NODE.network, prefix("10.244.250.0/24"), "flannel.1"))
SUBNETS = [f"10.244.{number}.0/24" for number in range(8, 13)] + ["10.244.8.0/23", "10.244.9.128/25", "10.245.0.0/24"]
RECORDS = st.lists(
    st.tuples(
        st.sampled_from(SUBNETS),
        st.sampled_from(["172.16.0.1", "172.16.0.2", "172.16.0.3", "172.16.0.4", "127.0.0.1"]),
        st.integers(1, 4),
    ),
    min_size=3,
    max_size=9,
)
"""Subnet, public IP, MAC."""
DEVICE = "flannel.1"
MEDDLING = {
    "route gone": "ip route flush {subnet} proto 111",
    "route elsewhere": "ip route replace {subnet} dev eth0 proto 111 metric {metric}",
    "route more": "ip route add {subnet} dev flannel.1 proto 111 metric 999",
    "neighbour gone": "ip neigh del {base} dev flannel.1",
    "neighbour altered": "ip neigh replace {base} lladdr 0a:00:00:00:77:77 dev flannel.1 nud permanent",
    "fdb gone": "bridge fdb del {mac} dev flannel.1 self",
    "fdb altered": "bridge fdb replace {mac} dev flannel.1 self dst 172.16.0.77",
    "fdb more": "bridge fdb replace 0a:00:00:00:66:66 dev flannel.1 self dst 172.16.0.66",
    "guard flushed": "nft flush set ip {guard} vteps",
    "guard deleted": "nft delete table ip {guard}",
}


class Killed(Exception):
    """The agent was."""


class Between:
    """A socket that may refuse, or be the last thing an agent did."""

    def __init__(self, real: RequestSocket) -> None:
        self._real, self.code, self.left = real, 0, -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def execute(self, messages: list[bytes], first: int, count: int = 0) -> dict[int, Refusal]:
        """As the real one."""
        if self.left >= 0:
            self._real.execute(messages[: self.left], first, count or len(messages))
            raise Killed
        if self.code:
            return {place: Refusal(self.code, "made by the test") for place in range(count or len(messages))}
        return self._real.execute(messages, first, count)


def machine(space: str, inside: Callable[[Callable[[], Any]], Any]) -> type[RuleBasedStateMachine]:
    """The machine in a namespace."""
    requests, sets = inside(RequestSocket), inside(NetfilterSocket)

    def shell(command: str) -> None:
        subprocess.run(["ip", "netns", "exec", space, "sh", "-c", command], check=False, stderr=subprocess.DEVNULL)

    def make_device() -> int:
        shell(f"ip link del {DEVICE}")

        def make() -> int:
            links = Links()
            try:
                lower = next(link.ifindex for link in requests.links() if link.name == "eth0")
                links.create(
                    VxlanDevice(DEVICE, 1, 8472, ip_number("192.168.1.2", 4), lower, 1450, OWN_MAC, False, False)
                )
                found = links.read(DEVICE)
                assert found is not None
                links.set_up(found.ifindex)
                return found.ifindex
            finally:
                links.close()

        made: int = inside(make)
        return made

    class Interleaved(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            shell(f"nft delete table ip {TABLE.name}; ip route flush proto 111")
            self.socket, self.clock, self.rng = Between(requests), Clock(), random.Random(1)
            self.index = make_device()
            self.records: dict[str, Lease] = {}
            self.revision = 10
            self.begin()

        def begin(self) -> None:
            """An agent starts, and has its first list."""
            self.guard = Guard(V4, sets, self.clock)
            self.path = Datapath(V4, self.socket, self.clock, self.rng, None, (self.guard,))  # type: ignore[arg-type]
            self.device = TunnelNews()
            self.path.plan(NODE, "", Leases.of(self.records.values()))
            self.guard.ensure(TABLE)
            self.device.stands(self.path, self.index)
            self.connected = True
            self.unseen = True
            """Something is in the kernel that nobody has told this agent."""

        # --- the store

        @initialize(records=RECORDS)
        def there_are_some(self, records: list[tuple[str, str, int]]) -> None:
            self.somebody_puts(records)
            self.killed_and_started_again(0)

        @rule(records=RECORDS)
        def somebody_puts(self, records: list[tuple[str, str, int]]) -> None:
            for subnet, host, mac in records:
                self.revision += 1
                made = lease(subnet, host, f"0a:00:00:00:01:{mac:02x}")
                was = self.records.get(made.key)
                created = was.created if was is not None else self.revision
                self.records[made.key] = made._replace(created=created, modified=self.revision)
                if self.connected:
                    self.path.put(self.records[made.key])

        @rule(subnet=st.sampled_from(SUBNETS))
        def somebody_drops(self, subnet: str) -> None:
            self.revision += 1
            if self.records.pop(subnet.replace("/", "-"), None) is not None and self.connected:
                self.path.drop(subnet.replace("/", "-"))

        @rule()
        def the_watch_breaks(self) -> None:
            self.connected = False

        @rule()
        def listed_again(self) -> None:
            self.path.replace(Leases.of(self.records.values()), "")
            self.connected = True

        # --- others, and the kernel

        @rule(what=st.sampled_from(sorted(MEDDLING)), subnet=st.sampled_from(SUBNETS), told=st.booleans())
        def somebody_meddles(self, what: str, subnet: str, told: bool) -> None:
            before = self.read()
            base = subnet.partition("/")[0]
            mac = next((mac for there, mac in before[1] if there == ip_number(base, 4)), 1)
            metric = next((key.metric for key, *_ in before[0] if key.base == ip_number(base, 4)), 5)
            shell(
                MEDDLING[what].format(subnet=subnet, base=base, mac=mac_text(mac or 1), metric=metric, guard=TABLE.name)
            )
            if told:
                self.tell(before, self.read())
            else:
                self.unseen = True

        @rule()
        def the_device_goes_down_and_up(self) -> None:
            shell(f"ip link set {DEVICE} down; ip link set {DEVICE} up")
            self.device.went_down(self.path)
            self.device.set_up(self.path)

        @rule()
        def the_device_goes_and_is_made_again(self) -> None:
            self.index = make_device()
            self.device.went(self.path)
            self.device.made(self.path, self.index)

        @rule(code=st.sampled_from([errno.ENOBUFS, errno.EPERM, errno.EBUSY, 0, 0]))
        def the_kernel_refuses_or_relents(self, code: int) -> None:
            self.socket.code = code

        # --- the agent

        @rule(seconds=st.sampled_from([0.1, 3.0, GRACE_S + 1]))
        def time_passes(self, seconds: float) -> None:
            self.clock.now += seconds
            self.turn_of_the_guard()
            self.path.apply()

        @rule()
        def a_slice_of_a_look(self) -> None:
            inside(lambda: self.path.resync({}))

        @rule()
        def a_whole_look(self) -> None:
            self.path.end_resync()  # one under way may have passed what came since
            while inside(lambda: self.path.resync({})):
                pass
            self.unseen = False

        @rule()
        def a_check_of_the_guard(self) -> None:
            self.guard.ensure(TABLE)

        @rule(after=st.integers(0, 8))
        def killed_and_started_again(self, after: int) -> None:
            self.socket.left = after
            with suppress(Killed):
                self.path.apply()
            self.socket.left = -1
            self.begin()

        def turn_of_the_guard(self) -> None:
            """As the agent: what is refused is looked at whole."""
            try:
                self.guard.apply()
            except KernelError:
                self.guard.ensure(TABLE)

        # --- the end

        def teardown(self) -> None:
            self.socket.code = 0
            if not self.connected:
                self.listed_again()
            self.guard.ensure(TABLE)
            for _ in range(30):
                if self.unseen or self.path.resyncing() or self.path.rec.in_doubt:
                    self.path.rec.in_doubt = False
                    self.a_whole_look()
                while self.path.apply():
                    pass
                self.clock.now += 40.0
                self.turn_of_the_guard()
                if not self.path.rec.differing() and not self.path.rec.in_doubt:
                    break
            self.clock.now += GRACE_S + 1
            self.guard.apply()
            known = dict(self.path.table.records())
            assert {key: one._replace(modified=0) for key, one in known.items()} == {
                key: one._replace(modified=0) for key, one in self.records.items()
            }
            peers = [known[key] for key in by_the_plain_rule(list(known.values()), self.path.table.listed or 0)]
            routes, neighbours, fdb = self.read()
            wanted = {entry for peer in peers for entry in entries(NODE, peer)}
            assert {(key, via) for key, via, _, _ in routes} == {
                (k, v.via) for table, k, v in wanted if table == ROUTES
            }
            assert all(oif == self.index for _, _, oif, _ in routes)
            assert neighbours == {(key, value.mac) for table, key, value in wanted if table == NEIGHBOURS}
            assert fdb == {(key, value.dst) for table, key, value in wanted if table == FDB}
            let_in = {ip_text(4, int.from_bytes(key, "big")) for key in sets.elements(TABLE, TABLE.sets[0])}
            assert let_in == {ip_text(4, peer.v4.public_ip) for peer in peers if peer.v4}
            assert sets.is_formed(TABLE)

        def read(self) -> tuple[set[Any], set[Any], set[Any]]:
            """Routes of ours (elsewhere only those into our network), neighbours and FDB of the device, as plain tuples."""
            routes = {
                (r.key, r.via, r.oif, r)
                for r in requests.routes(V4)
                if r.oif == self.index or (r.protocol == 111 and NODE.network.holds(r.key.base))
            }
            neighbours = {(n.address, n.mac) for n in requests.neighbours(V4, self.index) if n.state & 0x80}
            return routes, neighbours, {(f.mac, f.dst) for f in requests.fdb(V4, self.index)}

        def tell(self, before: tuple[set[Any], set[Any], set[Any]], after: tuple[set[Any], set[Any], set[Any]]) -> None:
            """As the kernel notifies: what went, then what is there now."""
            for *_, route in before[0] - after[0]:
                self.path.on_route(RouteSeen(route, gone=True), {})
            for *_, route in after[0] - before[0]:
                self.path.on_route(RouteSeen(route, gone=False), {})
            neighbours = {n.address: n for n in requests.neighbours(V4, self.index)}
            keys = {address for address, _ in after[1]}
            for address, mac in before[1] - after[1]:
                if address not in keys:
                    seen = next(iter(neighbours.values()), None)
                    found = seen._replace(address=address, mac=mac) if seen else None
                    if found is not None:
                        self.path.on_entry(NEIGHBOURS, found, address, gone=True)
            for address, _ in after[1] - before[1]:
                self.path.on_entry(NEIGHBOURS, neighbours[address], address, gone=False)
            table = {f.mac: f for f in requests.fdb(V4, self.index)}
            for mac, dst in before[2] - after[2]:
                seen_fdb = next(iter(table.values()), None)
                if mac not in table and seen_fdb is not None:
                    self.path.on_entry(FDB, seen_fdb._replace(mac=mac, dst=dst), mac, gone=True)
            for mac, _ in after[2] - before[2]:
                self.path.on_entry(FDB, table[mac], mac, gone=False)

    Interleaved.close = lambda: (requests.close(), sets.close())  # type: ignore[attr-defined]
    return Interleaved


def test_whatever_happens_the_end_is_what_the_plain_rule_says(space, inside):
    made = machine(space, inside)
    try:
        run_state_machine_as_test(
            made,
            settings=settings(
                max_examples=100,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                derandomize=True,
            ),
        )
    finally:
        made.close()  # type: ignore[attr-defined]
