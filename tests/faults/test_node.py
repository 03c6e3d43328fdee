"""What somebody does to the node."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from lease.families import FAMILIES, V6, Family
from lease.model import ip_number, ip_text, mac_text
from overlay.api.family import of_family
from overlay.lab import netns
from tests.support.faults import picture


class Names(NamedTuple):
    """What commands of a family call things."""

    device: str
    sysctl: str
    """The device's name in `sysctl`."""
    other_address: str
    underlay: str
    nodes: str
    """Addresses of nodes begin so."""
    length: int
    set_forwarding: str


OF = {
    4: Names("flannel.1", "flannel/1", "10.244.99.99/16", "192.168.1.1", "192.168.1.", 24, "net.ipv4.ip_forward"),
    6: Names("flannel-v6.1", "flannel-v6/1", "fd00:10:244:99::99/64", "fd00:192:168:1::1", "fd00:192:168:1::", 64, "net.ipv6.conf.all.forwarding"),
}  # fmt: skip
FAULTS = {
    "a route deleted": "ip route del {route}",
    "all routes of the device flushed": "ip -{n} route flush dev {device} proto 111",
    "a route led elsewhere": "ip route replace {route} dev {device}",
    "a neighbour deleted": "ip neigh del {base} dev {device}",
    "a neighbour with another MAC": "ip neigh replace {base} lladdr 0a:00:00:00:00:77 dev {device} nud permanent",
    "an FDB entry deleted": "bridge fdb del {mac} dev {device} self dst {nodes}3",
    "an FDB entry led elsewhere": "bridge fdb replace {mac} dev {device} self dst {nodes}77",
    "the FDB flushed": "bridge fdb del {mac} dev {device} self",
    "the device set down": "ip link set {device} down",
    "the device deleted": "ip link del {device}",
    "the device with another MAC": "ip link set {device} address 0a:00:00:00:00:78",
    "the device with another MTU": "ip link set {device} mtu 1300",
    "the device's address deleted": "ip -{n} addr flush dev {device} scope global",
    "another address on the device": "ip addr add {other_address} dev {device}",
    "the whole nft ruleset flushed": "nft flush ruleset",
    "the nat table deleted": "nft delete table {nft} overlay-1",
    "the guard's table deleted": "nft delete table {nft} overlay-1-guard",
    "the guard's addresses flushed": "nft flush set {nft} overlay-1-guard vteps",
    "the guard's rules flushed": "nft flush chain {nft} overlay-1-guard input",
    "a rule before the guard's": "nft insert rule {nft} overlay-1-guard input accept",
    "the nat rules flushed": "nft flush chain {nft} overlay-1 postrouting",
    "the pods' rules flushed": "nft flush chain bridge overlay-1-pods prerouting",
    "the pods' addresses flushed": "nft flush set bridge overlay-1-pods addresses{six}",
    "the pods' table deleted": "nft delete table bridge overlay-1-pods",
    "forwarding switched off": "sysctl -qw {set_forwarding}=0",
    "forwarding of the device switched off": "sysctl -qw net.ipv{n}.conf.{sysctl}.forwarding=0",
    "router advertisements taken by the device": "sysctl -qw net.ipv6.conf.{sysctl}.accept_ra=1",
    "subnet.env deleted": "rm {run_dir}/subnet.env",
    "subnet.env altered": "sh -c 'echo FLANNEL_SUBNET=10.9.9.1/24 > {run_dir}/subnet.env'",
    "the CNI list deleted": "rm {run_dir}/cni/10-flannel.conflist",
    "the CNI list cut short": "truncate -s 20 {run_dir}/cni/10-flannel.conflist",
}  # fmt: skip
IPV4_ALONE = ("forwarding of the device switched off",)
"""tests/support/faults.py says why."""
COSTS_PACKETS = (
    "route", "neighbour", "FDB", "device", "forwarding switched off", "addresses flushed", "address on the device"
)  # fmt: skip
"""Words of faults that stop traffic until they are mended."""


def _family(scene) -> Family:
    """The family that faults are of: IPv6 where the network has it."""
    return FAMILIES[scene.world.families[-1]]


def _tunnel(scene) -> Any:
    """Its device on node1, None where there is none."""
    return scene.world.device("node1", OF[_family(scene).number].device)


def _command(scene, text: str) -> list[str]:
    family = _family(scene)
    kernel, names = scene.world.kernel("node1", family=family), OF[family.number]
    (base, length), route = next(iter(kernel["routes"].items()))
    neighbour, mac = next(iter(kernel["neighbours"].items()))
    filled = text.format(
        **names._asdict(), n=family.number, nft=family.nft, six="6" if family is V6 else "",
        route=f"{ip_text(family.number, base)}/{length} metric {route.key.metric}",
        base=ip_text(family.number, neighbour), mac=mac_text(mac), run_dir=scene.agents[0].run_dir,
    )  # fmt: skip
    return ["sh", "-c", filled]


class Unhelped:
    """A command on node1 while its agent is stopped, so that the control sees what it does before it is undone."""

    def __init__(self, scene, command: list[str], broken: Callable[[], bool]) -> None:
        self._scene, self._command, self._broken, self._was_broken = scene, command, broken, False

    def inject(self) -> None:
        """The agent goes on afterwards."""
        with self._scene.agents[0].paused():
            self._scene.world.run("node1", *self._command)
            self._was_broken = self._broken()

    def bites(self) -> bool:
        """Whether it was."""
        return self._was_broken


def test_one_thing_at_a_time(scene):
    """Each is seen as it is done, and undone; what stops traffic costs little of it, all else none."""
    scene.begin("--ip-masq")
    for fault, text in FAULTS.items():
        if fault in IPV4_ALONE and _family(scene) is V6:
            continue
        before = picture(scene.world, scene.agents[0])
        seen = Unhelped(scene, _command(scene, text), lambda before=before: _differs(scene, before))
        lost = scene.suffer(fault, f"`{text}`", seen.inject, seen.bites)
        if not any(words in fault for words in COSTS_PACKETS):
            assert lost == 0, fault
        others = {number: cost for number, cost in scene.lost_by_family.items() if number != _family(scene).number}
        if "forwarding" not in fault and "nft ruleset" not in fault:
            assert not any(others.values()), f"{fault}: a fault of one family costs the other"


def _differs(scene, before) -> bool:
    try:
        return picture(scene.world, scene.agents[0]) != before
    except (OSError, AssertionError):  # a file or the device is not there
        return True


def _all_of_it(scene) -> str:
    """One script of all faults: what alters first, what deletes afterwards, so that each finds its thing."""
    lines = sorted(
        FAULTS.values(), key=lambda text: any(word in text for word in ("rm ", "link del", "delete", "flush rule"))
    )
    return "\n".join(f"{_command(scene, text)[2]} 2>/dev/null || true" for text in lines)


def test_all_at_once(scene):
    """One after the other, without a pause, from a shell: nothing of the picture is as it was."""
    scene.begin("--ip-masq")

    def nothing_is_left() -> bool:
        world, node = scene.world, scene.agents[0].node
        family = _family(scene)
        assert not world.kernel(node, family=family)["routes"]
        assert _tunnel(scene) is None
        assert "overlay-1" not in world.run(node, "nft", "list", "ruleset")
        assert not (scene.agents[0].run_dir / "subnet.env").exists()
        assert not (scene.agents[0].run_dir / "cni/10-flannel.conflist").exists()
        return world.run(node, "sysctl", "-n", OF[family.number].set_forwarding).strip() == "0"

    seen = Unhelped(scene, ["sh", "-c", _all_of_it(scene)], nothing_is_left)
    scene.suffer("all of it at once", "one shell script of all the lines above", seen.inject, seen.bites)


def test_all_of_it_again_and_again_while_peers_come_and_go(scene):
    """A hundred changes of records a second beside it."""
    scene.begin("--ip-masq")
    ending = threading.Event()

    def churn() -> None:
        number = 0
        while not ending.is_set():
            number = (number + 1) % 40
            key = f"10.244.{200 + number}.0-24"
            value = f'{{"PublicIP":"192.168.1.{100 + number}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"0a:00:00:00:01:{number:02x}"}}}}'
            scene.world.put_record(key, value)
            time.sleep(0.01)
            if number % 2:
                scene.world.drop_record(key)
            time.sleep(0.005)
        for number in range(41):
            scene.world.drop_record(f"10.244.{200 + number}.0-24")

    thread = threading.Thread(target=churn)
    script = _all_of_it(scene)

    def inject() -> None:
        thread.start()
        for _ in range(20):
            scene.world.run("node1", "sh", "-c", script)
            time.sleep(0.3)

    def recover() -> bool:
        ending.set()
        thread.join()
        return True

    # an address that left is let in for a minute more: of the guard only the peer counts here
    before = picture(scene.world, scene.agents[0])

    def whole() -> bool:
        now = picture(scene.world, scene.agents[0])
        return all(now[name] == before[name] for name in before if name != "rules")

    scene.suffer(
        "all of it, 20 times, while peers come and go", "the script, beside some 60 writes a second to etcd",
        inject, lambda: scene.agents[0].status()["counters"]["mended_device"] >= 10, 40, recover, whole,
    )  # fmt: skip


def _addressed(scene, host: int) -> str:
    """A shell line: eth0 has its addresses, and the default routes."""
    lines = []
    for number in scene.world.families:
        names = OF[number]
        nodad = " nodad" if number == 6 else ""
        lines += [
            f"ip addr replace {names.nodes}{host}/{names.length} dev eth0{nodad}",
            f"ip -{number} route replace default via {names.underlay}",
        ]
    return " && ".join(lines)


@pytest.mark.parametrize(
    ("fault", "command", "undo"),
    [
        ("the underlay set down, a second later up", "ip link set eth0 down", "ip link set eth0 up"),
        ("the underlay's address gone for a second", "ip addr del {nodes}2/{length} dev eth0", "true"),
    ],
)
def test_the_underlay_for_a_while(scene, fault, command, undo):
    scene.begin()
    world, family = scene.world, _family(scene)
    names = OF[family.number]
    command = command.format(**names._asdict())

    def away() -> bool:
        there = world.run("node1", "ip", f"-{family.number}", "addr", "show", "dev", "eth0", "up")
        return f"{names.nodes}2" not in there

    def recover() -> bool:
        time.sleep(1)
        world.run("node1", "sh", "-c", f"{undo} && {_addressed(scene, 2)}")
        return True

    lost = scene.suffer(fault, f"`{command}`", lambda: world.run("node1", "sh", "-c", command), away, 30, recover)
    assert lost > 50, "it was away"


def test_the_underlay_is_taken_out_and_put_back(scene):
    """An interface that leaves its namespace is unregistered, and the kernel takes the vxlan device on it along."""
    scene.begin()
    world = scene.world
    elsewhere = f"{world.namespace('node1')}-away"
    netns.create(elsewhere)
    try:
        out = f"ip link set eth0 netns {netns.path(elsewhere)}"

        def gone() -> bool:
            return not world.index("node1", "eth0") and _tunnel(scene) is None

        def recover() -> bool:
            time.sleep(1)
            home = netns.path(world.namespace("node1"))
            netns.inside(elsewhere, lambda: subprocess.run(["ip", "link", "set", "eth0", "netns", home], check=True))
            world.run("node1", "sh", "-c", f"ip link set eth0 up && {_addressed(scene, 2)}")
            return True

        lost = scene.suffer(
            "the underlay's interface taken out for a second", f"`{out}` and back; the kernel deletes the tunnel's device with it",
            lambda: world.run("node1", "sh", "-c", out), gone, 30, recover,
        )  # fmt: skip
        assert lost > 50, "it was away"
    finally:
        netns.delete(elsewhere)


def test_the_underlay_gets_another_mtu(scene):
    scene.begin()
    was = _tunnel(scene).mtu
    seen = Unhelped(scene, ["ip", "link", "set", "eth0", "mtu", "1400"], lambda: _tunnel(scene).mtu == was)
    lost = scene.suffer(
        "the underlay's MTU lowered", "`ip link set eth0 mtu 1400`", seen.inject, seen.bites,
        whole=lambda: _tunnel(scene).mtu == was - 100,
    )  # fmt: skip
    assert lost == 0


def test_the_underlay_is_renamed(scene):
    """An interface that is up can be renamed since Linux 6.0."""
    scene.begin()
    world = scene.world
    seen = Unhelped(
        scene, ["ip", "link", "set", "eth0", "name", "wan0"], lambda: not world.index("node1", "eth0") and world.index("node1", "wan0")
    )  # fmt: skip
    lost = scene.suffer(
        "the underlay's interface renamed", "`ip link set eth0 name wan0`", seen.inject, seen.bites,
        whole=lambda: of_family(scene.agents[0].status(), _family(scene).number)["underlay"]["interface"] == "wan0"
        and scene.agents[0].ready(),
    )  # fmt: skip
    assert lost == 0


def test_the_underlay_is_readdressed(scene):
    """Peers learn the new address from the record; what is under way until then is lost."""
    scene.begin()
    world, family = scene.world, _family(scene)
    names = OF[family.number]
    moved = ip_number(f"{names.nodes}77", family.number)
    was = _tunnel(scene).local
    command = f"ip addr del {names.nodes}2/{names.length} dev eth0; {_addressed(scene, 77)}"
    seen = Unhelped(scene, ["sh", "-c", command], lambda: _tunnel(scene).local == was)
    scene.suffer(
        "the underlay gets another address", f"`{command}`", seen.inject, seen.bites,
        whole=lambda: _tunnel(scene).local == moved
        and [*world.kernel("node2", family=family)["fdb"].values()] == [moved],
    )  # fmt: skip
