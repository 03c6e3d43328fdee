"""What a pod does that a policy keeps out, with raw frames: every way past layer 3, and odd packets. Without a policy they
arrive, which shows that the frames are good."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from contextlib import closing
from ipaddress import IPv4Address, IPv4Network, IPv6Address

import pytest

from overlay.lab import netns
from tests.agent.test_antispoof import checksum
from tests.policy.test_enforcing import DENY_ALL, FROM_B, asks, objects, three  # noqa: F401 (a fixture)
from tests.support.wait import PATIENCE, until

HEARS_S = 0.5
UNHEARD = 4444
"""A port that nobody listens at: who answers begins a connection of its own, which is allowed, and so is what comes back."""
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60
"""IPv6 extension headers (RFC 8200, 4.1)."""


class Tap:
    """A pod's eth0: frames out, and whatever comes in."""

    def __init__(self, namespace: str) -> None:
        def make() -> socket.socket:
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            made.bind(("eth0", 3))
            made.setblocking(False)
            return made

        self._socket = netns.inside(namespace, make)
        self.mac = self._socket.getsockname()[4]

    def send(self, frame: bytes) -> None:
        self._socket.send(frame)

    def drain(self) -> list[bytes]:
        """The frames that came, but for our own."""
        found = []
        while True:
            try:
                data, where = self._socket.recvfrom(4000)
            except BlockingIOError:
                return found
            if where[2] != socket.PACKET_OUTGOING:
                found.append(data)

    def close(self) -> None:
        self._socket.close()


def l4(source: bytes, target: bytes, protocol: int, message: bytes, checksum_at: int) -> bytes:
    """With its checksum, over the pseudo header too."""
    padded = message + bytes(len(message) % 2)
    pseudo = source + target + (
        struct.pack(">IxxxB", len(message), protocol) if len(source) == 16 else struct.pack(">xBH", protocol, len(message))
    )  # fmt: skip
    return message[:checksum_at] + checksum(pseudo + padded) + message[checksum_at + 2 :]


def udp(source: bytes, target: bytes, token: bytes, port: int = UNHEARD) -> bytes:
    return l4(source, target, UDP, struct.pack(">HHHH", 5555, port, 8 + len(token), 0) + token, 6)


def tcp(source: bytes, target: bytes, flags: int, token: bytes, port: int = UNHEARD) -> bytes:
    head = struct.pack(">HHIIBBHHH", 5556, port, 1, 1, 5 << 4, flags, 1000, 0, 0)
    return l4(source, target, TCP, head + token, 16)


def ip(source: bytes, target: bytes, protocol: int, body: bytes, fragment: int = 0, options: bytes = b"") -> bytes:
    if len(source) == 16:
        return struct.pack(">IHBB", 6 << 28, len(body), protocol, 64) + source + target + body
    words = 5 + len(options) // 4
    head = struct.pack(">BBHHHBBH", 0x40 | words, 0, 4 * words + len(body), 77, fragment, 64, protocol, 0)
    head += source + target + options
    return head[:10] + checksum(head) + head[12:] + body


def chained(headers: tuple[int, ...], protocol: int, body: bytes) -> tuple[int, bytes]:
    """Behind extension headers; the first's number."""
    for kind in reversed(headers):
        if kind == FRAGMENT:
            body = struct.pack(">BBHI", protocol, 0, 0, 78) + body
        elif kind == ROUTING:
            body = struct.pack(">BBBBI", protocol, 0, 0, 0, 0) + body
        else:
            body = bytes((protocol, 0, 1, 4, 0, 0, 0, 0)) + body
        protocol = kind
    return protocol, body


class Attack:
    """From a pod to another. known: the frames by name, each with a token of its own to be known by."""

    def __init__(
        self, own: Tap, first: tuple[bytes, bytes], target: tuple[bytes, bytes], allowed: tuple[bytes, bytes], to: bytes
    ):
        """first, target, allowed: IPv4 and IPv6 address of the sender, the victim, and a pod that may; to: MAC."""
        self.tokens: dict[str, bytes] = {}
        self.frames: dict[str, bytes] = {}
        (s4, s6), (t4, t6), (a4, a6) = first, target, allowed
        for name, source, victim, kind in (("IPv4", s4, t4, b"\x08\x00"), ("IPv6", s6, t6, b"\x86\xdd")):
            head = to + own.mac + kind
            for flags, words in ((0x02, "SYN"), (0x03, "SYN and FIN"), (0x04, "RST"), (0x10, "ACK"), (0x00, "no flag")):
                token = self._token(f"{name} TCP {words}")
                self._put(f"{name} TCP {words}", head + ip(source, victim, TCP, tcp(source, victim, flags, token)))
            self._put(f"{name} UDP", head + ip(source, victim, UDP, udp(source, victim, self._token(f"{name} UDP"))))
            token = self._token(f"{name} of no protocol")
            self._put(f"{name} of no protocol", head + ip(source, victim, 253, token))
            protocol, body = (ICMP, b"\x08\0\0\0\0\1\0\1") if len(source) == 4 else (ICMPV6, b"\x80\0\0\0\0\1\0\1")
            token = self._token(f"{name} echo")
            message = body + token
            message = (
                message[:2] + checksum(message + bytes(len(message) % 2)) + message[4:]
                if protocol == ICMP else l4(source, victim, ICMPV6, message, 2)
            )  # fmt: skip
            self._put(f"{name} echo", head + ip(source, victim, protocol, message))
            # an error about a packet that was never sent
            token = self._token(f"{name} error")
            inner = ip(victim, source, UDP, udp(victim, source, token))
            message = (b"\x03\x03" if protocol == ICMP else b"\x01\x04") + bytes(6) + inner
            message = (
                message[:2] + checksum(message + bytes(len(message) % 2)) + message[4:]
                if protocol == ICMP else l4(source, victim, ICMPV6, message, 2)
            )  # fmt: skip
            self._put(f"{name} error", head + ip(source, victim, protocol, message))
        head = to + own.mac + b"\x08\x00"
        token = self._token("IPv4 later fragment")
        self._put("IPv4 later fragment", head + ip(s4, t4, UDP, token, fragment=2))
        token = self._token("IPv4 with options")
        self._put("IPv4 with options", head + ip(s4, t4, UDP, udp(s4, t4, token), options=b"\x07\x07\x04\0\0\0\0\0"))
        head = to + own.mac + b"\x86\xdd"
        for headers, words in (
            ((HOP_BY_HOP,), "hop-by-hop"), ((DESTINATION,), "destination options"), ((FRAGMENT,), "atomic fragment"),
            ((ROUTING,), "routing header"), ((DESTINATION, FRAGMENT, DESTINATION), "three headers"),
        ):  # fmt: skip
            token = self._token(f"IPv6 {words}")
            protocol, body = chained(headers, UDP, udp(s6, t6, token))
            self._put(f"IPv6 {words}", head + ip(s6, t6, protocol, body))
        for name, source, victim, kind in (("IPv4", a4, t4, b"\x08\x00"), ("IPv6", a6, t6, b"\x86\xdd")):
            token = self._token(f"{name} from another's address")
            frame = to + own.mac + kind + ip(source, victim, UDP, udp(source, victim, token))
            self._put(f"{name} from another's address", frame)

    def beside(self, own: Tap, first: tuple[bytes, bytes], victim: Tap, local: bytes, broadcast: bytes) -> None:
        """What a bridge carries beside layer 3. local: the victim's link-local address."""
        s4, _ = first
        mine = link_local(own.mac)
        for name, frame in {
            "to all": (b"\xff" * 6, b"\x08\x00", lambda t: ip(s4, b"\xff" * 4, UDP, udp(s4, b"\xff" * 4, t))),
            "to the subnet's all": (b"\xff" * 6, b"\x08\x00", lambda t: ip(s4, broadcast, UDP, udp(s4, broadcast, t))),
            "to all at its MAC": (victim.mac, b"\x08\x00", lambda t: ip(s4, b"\xff" * 4, UDP, udp(s4, b"\xff" * 4, t))),
            "multicast": (
                b"\x01\0\x5e\0\0\1",
                b"\x08\x00",
                lambda t: ip(s4, b"\xe0\0\0\1", UDP, udp(s4, b"\xe0\0\0\1", t)),
            ),
            "IPv6 multicast": (
                b"\x33\x33\0\0\0\1",
                b"\x86\xdd",
                lambda t: ip(mine, ALL_NODES, UDP, udp(mine, ALL_NODES, t)),
            ),
            "link-local": (victim.mac, b"\x86\xdd", lambda t: ip(mine, local, UDP, udp(mine, local, t))),
            "another ethertype": (victim.mac, b"\x88\xb5", lambda t: t),
            "802.3 length": (victim.mac, b"\x00\x20", lambda t: b"\xaa\xaa\x03\0\0\0\x88\xb5" + t),
        }.items():
            to, kind, made = frame
            self._put(name, to + own.mac + kind + made(self._token(name)))

    def _token(self, name: str) -> bytes:
        return self.tokens.setdefault(name, os.urandom(8))

    def _put(self, name: str, frame: bytes) -> None:
        self.frames[name] = frame

    def arriving(self, own: Tap, victim: Tap) -> set[str]:
        """Which of them the victim's interface sees."""
        victim.drain()
        for frame in self.frames.values():
            own.send(frame)
        found: set[str] = set()
        end = time.monotonic() + HEARS_S * PATIENCE
        while time.monotonic() < end:
            for data in victim.drain():
                found |= {name for name, token in self.tokens.items() if token in data}
            time.sleep(0.02)
        return found


ALL_NODES = IPv6Address("ff02::1").packed


def link_local(mac: bytes) -> bytes:
    return IPv6Address("fe80::").packed[:8] + bytes((mac[0] ^ 2, *mac[1:3], 0xFF, 0xFE, *mac[3:]))


def addresses(world, key: str) -> tuple[bytes, bytes]:
    four, six = world.ends[key]
    return IPv4Address(four.address).packed, IPv6Address(six.address).packed


def gateway_mac(world, key: str) -> bytes:
    """Where a pod sends what is not on its link."""
    text = json.loads(world.run(world.ends[key][0].node, "ip", "-j", "link", "show", "cni0"))[0]["address"]
    return bytes.fromhex(text.replace(":", ""))


ELSEWHERE = {
    "IPv4 from another's address", "IPv6 from another's address",
    "IPv4 of no protocol", "IPv4 error", "IPv6 error", "IPv4 later fragment", "IPv6 routing header",
}  # fmt: skip
"""May arrive without a policy or not: anti-spoofing, conntrack or the kernel itself stops some of them, somewhere."""


@pytest.mark.parametrize("source", ["x/c", "x/b"], ids=["on its node", "on another node"])
def test_nothing_passes_a_policy_and_all_passes_without(three, field, source):  # noqa: F811
    """x/a is isolated and nobody is allowed; the same frames arrive where there is no policy."""
    world = three
    allowed = "x/b" if source == "x/c" else "x/c"
    near = source == "x/c"
    with (
        closing(Tap(world.ends[source][0].namespace)) as own,
        closing(Tap(world.ends["x/a"][0].namespace)) as victim,
    ):
        first, target = addresses(world, source), addresses(world, "x/a")
        to = victim.mac if near else gateway_mac(world, source)
        attack = Attack(own, first, target, addresses(world, allowed), to)
        if near:
            subnet = IPv4Network((target[0], 24), strict=False)
            attack.beside(own, first, victim, link_local(victim.mac), subnet.broadcast_address.packed)
        open_ = set()
        until(
            "what is allowed arrives",
            lambda: open_.update(attack.arriving(own, victim)) or attack.frames.keys() - ELSEWHERE <= open_,
        )
        world.apply(
            objects(world, {**DENY_ALL, "spec": {**DENY_ALL["spec"], "podSelector": {"matchLabels": {"app": "a"}}}})
        )
        assert not any(asks(world, field, source, "x/a"))
        assert attack.arriving(own, victim) == set()
        one = world.agents[0]
        one.stop()
        assert attack.arriving(own, victim) == set(), "no agent runs"


def test_what_belongs_to_an_allowed_connection_passes(three, field):  # noqa: F811
    """Datagrams in fragments, and errors of ICMP; those of a forbidden one do not."""
    world = three
    udp_allowed = {"protocol": "UDP", "port": UNHEARD}
    spec = {
        **FROM_B["spec"],
        "ingress": [{**FROM_B["spec"]["ingress"][0], "ports": [udp_allowed, {"protocol": "UDP", "port": 80}]}],
    }
    world.apply(objects(world, {**FROM_B, "spec": spec}))
    for one, two in zip(world.ends["x/b"], world.ends["x/a"], strict=True):
        assert refused(one, two, UNHEARD), "nobody listens there, and says so"
        assert echoed(one, two, field, 8000), "in fragments"
    for one, two in zip(world.ends["x/c"], world.ends["x/a"], strict=True):
        assert not refused(one, two, UNHEARD)
        assert not echoed(one, two, field, 8000)


def connected(source, target, port: int) -> socket.socket:
    def make() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if target.family == 6 else socket.AF_INET, socket.SOCK_DGRAM)
        made.connect((target.address, port))
        made.settimeout(1.0 * PATIENCE)
        return made

    return netns.inside(source.namespace, make)


def refused(source, target, port: int) -> bool:
    with closing(connected(source, target, port)) as asking:
        asking.send(b"x")
        try:
            asking.recv(10)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            return False
    raise AssertionError("somebody answered")


def echoed(source, target, field, size: int) -> bool:
    """A datagram of that size, answered by the server there with its beginning."""
    field.forget(target.namespace)

    def listen() -> socket.socket:
        made = socket.socket(socket.AF_INET6 if target.family == 6 else socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((target.address, 80))
        made.settimeout(1.0 * PATIENCE)
        return made

    with closing(netns.inside(target.namespace, listen)) as serving, closing(connected(source, target, 80)) as asking:
        asking.send(bytes(size))
        try:
            data, there = serving.recvfrom(size)
            serving.sendto(data, there)
            return len(asking.recv(size)) == size
        except TimeoutError:
            return False
