"""Somebody flushes nftables while no agent runs: what pods made of that, and whom the next agent believes."""

from __future__ import annotations

import json
from ipaddress import IPv6Address

import pytest

from lease.model import ip_number
from overlay.lab import topology
from tests.agent.test_antispoof import Port, bound, honest, ipv4, ipv6
from tests.agent.test_guard import Listener, frame, send
from tests.support.wait import meanwhile, until


@pytest.fixture
def ports(world, closing):
    return lambda pod: closing(Port(world, pod))


def given_by_cni(world, folder, pod) -> None:
    """What libcni keeps of an attachment."""
    folder.mkdir(exist_ok=True)
    node = f"{pod.node}-{pod.name.rpartition('-')[2]}"
    inside = json.loads(world.run(node, "ip", "-j", "link", "show", "eth0"))[0]
    links = json.loads(world.run(pod.node, "ip", "-j", "link"))
    (end,) = [link for link in links if link["ifindex"] == inside["link_index"]]
    interfaces = [
        {"name": end["ifname"], "mac": end["address"]},
        {"name": "eth0", "mac": inside["address"], "sandbox": pod.namespace},
    ]
    result = {"ips": [{"address": f"{pod.address}/24", "interface": 1}], "interfaces": interfaces}
    names = [["K8S_POD_NAMESPACE", "default"], ["K8S_POD_NAME", pod.name]]
    (folder / f"cbr0-{pod.name}-eth0").write_text(json.dumps({"result": result, "cniArgs": names}))


def test_pods_have_what_cni_gave_them_and_lose_nothing(world, ports):
    """One takes addresses meanwhile: nobody's, another pod's, one of another node's subnet."""
    agent, second = world.nodes(2)
    results = agent.run_dir / "results"
    pods = [world.pod(agent, name) for name in ("evil", "other", "near")]
    far, still = world.pod(second, "far"), world.pod(agent, "still")
    for pod in (*pods, still):
        given_by_cni(world, results, pod)
    evil, other, near = map(ports, pods)
    until("all are bound", lambda: len(bound(world, "node1")) == 4)
    with (
        world.stream(still, far) as out,
        world.stream(far, pods[1]) as back,
        world.stream(pods[1], still) as here,
    ):
        agent.stop()
        world.run("node1", "nft", "flush", "ruleset")
        taken = [f"{pods[0].address.rpartition('.')[0]}.200", pods[1].address, "10.244.99.99"]
        for address in taken:
            world.run(evil.node, "ip", "addr", "add", f"{address}/32", "dev", "eth0")
        for at, address in enumerate(taken):
            evil.send(near.mac + evil.mac + b"\x08\x00" + ipv4(packed(address), near.ip, b"meanwhile-%d" % at))
            assert near.hears(b"meanwhile-%d" % at), "the control: nobody checks"
        agent = world.restart(agent, f"--cni-results-dir={results}").wait_ready()
        until("all are bound", lambda: len(bound(world, "node1", "addresses")) == len(bound(world, "node1")) == 4)
        for at, address in enumerate(taken):
            evil.send(near.mac + evil.mac + b"\x08\x00" + ipv4(packed(address), near.ip, b"afterwards-%d" % at))
            assert not near.hears(b"afterwards-%d" % at), address
        for one in (evil, other):
            one.send(honest(one, near)["ipv4"])
            assert near.hears(b"ipv4-honest")
    assert [stream.lost() for stream in (out, back, here)] == [0, 0, 0]
    assert agent.status()["counters"]["dropped_spoofed"] == len(taken)
    assert not agent.events("pods.mended")


def packed(address: str) -> bytes:
    return ip_number(address, 4).to_bytes(4, "big")


@pytest.mark.parametrize("what", ["its IPv6 address", "its MAC"])
def test_nor_do_they_have_what_another_makes_its_own(world, ports, what):
    """An IPv6 address or a MAC that one pod takes from another while no agent runs stays the other's."""
    agent = world.agent(world.node(1), "--node-name=node1").wait_ready()
    results = agent.run_dir / "results"
    pods = [world.pod(agent, name) for name in ("evil", "other", "near")]
    for pod in pods:
        given_by_cni(world, results, pod)
    evil, other, near = map(ports, pods)
    until("all are bound", lambda: len(bound(world, "node1")) == 3)
    agent.stop()
    world.run("node1", "nft", "flush", "ruleset")
    if what == "its MAC":
        world.run(evil.node, "ip", "link", "set", "eth0", "address", other.mac.hex(":"))
        spoofed = near.mac + other.mac + b"\x08\x00" + ipv4(evil.ip, near.ip, b"spoofed-it")
    else:
        world.run(evil.node, "ip", "addr", "add", f"{IPv6Address(other.v6)}/128", "dev", "eth0", "nodad")
        spoofed = near.mac + evil.mac + b"\x86\xdd" + ipv6(other.v6, near.v6, 128, b"\0\0\0\0spoofed-it")
    agent = world.restart(agent, f"--cni-results-dir={results}").wait_ready()
    until("all are bound", lambda: len(bound(world, "node1")) == 3)
    heard = {}
    for name in ("ipv4", "ipv6"):
        other.send(honest(other, near)[name])
        heard[name] = near.hears(f"{name}-honest".encode())
    evil.send(spoofed)
    assert (heard, near.hears(b"spoofed-it")) == ({"ipv4": True, "ipv6": True}, False)


@pytest.mark.parametrize("lost", ["tables", "tables and device"])
@pytest.mark.parametrize("guarded", [False, True], ids=["control", "guarded"])
def test_a_neighbour_that_never_stops_is_not_let_in_by_a_start(world, closing, guarded, lost):
    """Where the device is gone, too, nothing takes its frames until an agent makes one: with the guard before it."""
    flag = f"--vxlan-guard={str(guarded).lower()}"
    agent, second = world.nodes(2, flag)
    pod, far = world.pod(agent, "pod"), world.pod(second, "far")
    there, underlay = closing(Listener(pod)), topology.underlay_name(world.lab)
    forged = frame(agent.mac(), far.address, pod.address, b"forged")
    agent.stop()
    world.run("node1", "nft", "flush", "ruleset")
    send(underlay, topology.GATEWAY, "192.168.1.2", forged)
    assert there.hears(b"forged"), "nobody guards it"
    if lost == "tables":
        agent = world.restart(agent, flag).wait_ready()
        send(underlay, topology.GATEWAY, "192.168.1.2", forged)
    else:
        world.run("node1", "ip", "link", "del", "flannel.1")
        with meanwhile(lambda _count: send(underlay, topology.GATEWAY, "192.168.1.2", forged)):
            agent = world.restart(agent, flag).wait_ready()
    assert there.hears(b"forged") != guarded
