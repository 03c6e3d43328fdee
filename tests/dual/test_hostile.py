"""Records of IPv6 that nobody wants: each is refused with a reason, alone, and costs nobody a packet."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest

from lease.families import V6
from tests.support.reach import all_reach
from tests.support.wait import until

GOOD = {
    "PublicIP": "0.0.0.0", "PublicIPv6": "fd00:192:168:1::9", "BackendType": "vxlan",
    "BackendV6Data": {"VNI": 1, "VtepMAC": "0a:00:00:00:06:09"},
}  # fmt: skip
DEEP = "[" * 4000


def key(subnet: str) -> str:
    return f"0.0.0.0-0&{subnet}"


def changed(**fields) -> dict:
    return GOOD | fields


KEYS = {
    "outside of Network": ("fd00:99::-64", "outside"),
    "the underlay": ("fd00:192:168:1::-64", "outside"),
    "all of Network": ("fd00:10:244::-48", "too large"),
    "half of Network": ("fd00:10:244:8000::-49", "too large"),
    "host bits": ("fd00:10:244:9::1-64", "host"),
    "longer than an address": ("fd00:10:244:9::-129", "key"),
    "no length": ("fd00:10:244:9::", "key"),
    "no address": ("-64", "key"),
    "link-local": ("fe80::-64", "outside"),
    "multicast": ("ff02::-64", "outside"),
    "capital letters": ("FD00:10:244:9::-64", "key"),
    "another family": ("10.244.9.0-24", "key"),
    "an address twice": ("fd00:10:244:9::&fd00:10:244:a::-64", "key"),
}
VALUES = {
    "no JSON": ("{", "JSON"),
    "deep JSON": (DEEP, "JSON"),
    "no object": ("7", ""),
    "no public IP": (changed(PublicIPv6=None), "PublicIPv6"),
    "a number for an address": (changed(PublicIPv6=7), "PublicIPv6"),
    "a zone": (changed(PublicIPv6="fe80::1%eth0"), "PublicIPv6"),
    "link-local": (changed(PublicIPv6="fe80::1"), "cannot be"),
    "multicast": (changed(PublicIPv6="ff02::1"), "cannot be"),
    "loopback": (changed(PublicIPv6="::1"), "cannot be"),
    "mapped IPv4": (changed(PublicIPv6="::ffff:192.168.1.9"), "cannot be"),
    "a pod's address": (changed(PublicIPv6="fd00:10:244:5::7"), ""),
    "our own address": (changed(PublicIPv6="fd00:192:168:1::2"), "our own"),
    "another VNI": (changed(BackendV6Data={"VNI": 7, "VtepMAC": "0a:00:00:00:06:09"}), "VNI"),
    "no MAC": (changed(BackendV6Data={"VNI": 1}), "VtepMAC"),
    "a zero MAC": (changed(BackendV6Data={"VNI": 1, "VtepMAC": "00:00:00:00:00:00"}), "all zero"),
    "a multicast MAC": (changed(BackendV6Data={"VNI": 1, "VtepMAC": "01:00:5e:00:00:01"}), "multicast"),
    "our own MAC": (changed(BackendV6Data={"VNI": 1, "VtepMAC": "OURS"}), ""),
    "a list for data": (changed(BackendV6Data=[]), "BackendV6Data"),
    "no data": (changed(BackendV6Data=None), "BackendV6Data"),
    "another backend": (changed(BackendType="host-gw"), "BackendType"),
    "much": ("x" * 100_000, "bytes"),
}
FREE = "fd00:10:244:9::-64"
assert not KEYS.keys() & VALUES.keys() - {"link-local", "multicast"}


@pytest.fixture
def talking(world6):
    """Two nodes whose pods talk by IPv6 all the time, and a good peer that is none."""
    agents = world6.nodes(2)
    pods = [next(end for end in world6.pod_ends(agent, "a") if end.family == 6) for agent in agents]
    world6.put_record(
        key("fd00:10:244:7777::-64"),
        changed(PublicIPv6="fd00:192:168:1::77", BackendV6Data={"VNI": 1, "VtepMAC": "0a:00:00:00:06:77"}),
    )
    until("a good peer", lambda: len(world6.kernel("node1", family=V6)["routes"]) == 2)
    until("pods reach each other", lambda: all_reach(pods), 25)
    with ExitStack() as stack:
        streams = [stack.enter_context(world6.stream(*pair)) for pair in (pods, pods[::-1])]
        until("they talk", lambda: all(stream.came for stream in streams))
        yield world6, agents
    assert [stream.lost() for stream in streams] == [0, 0]


def refused(agent, where: str, words: str) -> bool:
    found = agent.refused_records()
    reason = next((text for name, text in found.items() if name == where or where in name or name in where), "")
    return bool(reason) and words in reason


def test_each_is_refused_alone(talking):
    world, agents = talking
    agent, before = agents[0], world.kernel("node1", family=V6)
    mac = world.device("node1", "flannel-v6.1").mac
    ours = ":".join(f"{mac >> shift & 255:02x}" for shift in range(40, -8, -8))
    for name, (subnet, words) in KEYS.items():
        where = key(subnet)
        world.put_record(where, GOOD)
        until(f"{name}: refused", lambda where=where, words=words: refused(agent, where, words))
        assert world.kernel("node1", family=V6) == before, name
        world.drop_record(where)
    where = key(FREE)
    for name, (value, words) in VALUES.items():
        world.put_record(where, GOOD)
        until(f"{name}: control: it is a peer", lambda: len(world.kernel("node1", family=V6)["routes"]) == 3)
        text = value if isinstance(value, str) else json.dumps(value).replace("OURS", ours)
        world.put_record(where, text)
        until(f"{name}: refused", lambda words=words: refused(agent, where, words))
        until(f"{name}: nothing of it is in the kernel", lambda: world.kernel("node1", family=V6) == before)
        world.drop_record(where)
        until("it is gone", lambda: not agent.refused_records())
    assert agent.ready()


def test_a_start_among_all_of_them(talking):
    world, agents = talking
    keys = {name: subnet for name, (subnet, _) in KEYS.items()}
    for subnet in keys.values():
        world.put_record(key(subnet), GOOD)
    for number, (value, _) in enumerate(VALUES.values(), 0x100):
        world.put_record(key(f"fd00:10:244:{number:x}::-64"), value if isinstance(value, str) else json.dumps(value))
    count = len(KEYS) + len(VALUES)
    until("all but one at most are refused", lambda: len(agents[0].refused_records()) >= count - 1, 20)
    before = world.kernel("node1", family=V6)
    agents[0].kill()
    again = world.restart(agents[0]).wait_ready()
    until(
        "the good ones are its peers",
        lambda: len(again.status()["peers_ipv6" if "peers_ipv6" in again.status() else "peers"]) >= 2,
    )
    until("its kernel is as before", lambda: world.kernel("node1", family=V6) == before)
