"""What doctor says of a node on which no agent runs: its entries stand in the kernel, and can be looked at."""

from __future__ import annotations

import pytest

from tests.diagnosis.test_faults import doctor


def entries(world, agent) -> tuple[str, str]:
    (found,) = (each for each in doctor(world, agent) if each["subject"] == "entries")
    return found["state"], found["what"]


FORWARD = (
    "add table ip planted; add chain ip planted onward { type filter hook forward priority 0; };"
    " add rule ip planted onward ip daddr 10.244.0.0/16 drop"
)
WHOLE = {
    "vxlan": "2 by flannel.1, with a route, a neighbour and an FDB entry each",
    "host-gw": "2 directly, with a route each",
    "wireguard": "2 by flannel-wg, with a route (their keys were not looked at) each",
}


@pytest.mark.parametrize("backend", WHOLE)
def test_entries_that_stand_are_counted_and_a_missing_one_is_named(world, backend):
    world.config(Backend={"Type": backend})
    one, two, _ = world.nodes(3)
    world.pod(one, "a")
    one.kill()
    state, what = entries(world, one)
    assert what.startswith(f"peers in the kernel: {WHOLE[backend]}. Who joins while no agent runs gets none")
    assert state == ("ok" if backend == "vxlan" else "not tried"), (
        "which peers there should be vxlan's entries tell alone"
    )
    subjects = {each["subject"]: each["state"] for each in doctor(world, one)}
    assert subjects["agent"] == "wrong"
    assert {subjects[name] for name in ("sysctls", "firewalls: forward", "MTU", "addresses")} == {"ok"}
    assert subjects["ways"] == "ok"
    world.run("node1", "nft", FORWARD)
    named = {each["subject"]: each for each in doctor(world, one)}["ways"]
    assert (named["state"], "chain ip planted onward drops" in named["what"]) == ("wrong", True), named
    world.run("node1", "nft", "delete table ip planted")
    if backend == "vxlan":
        base = str(two.subnet()).partition("/")[0]
        route = next(line for line in world.run("node1", "ip", "route").splitlines() if line.startswith(f"{base}/24"))
        world.run("node1", "ip", "route", "del", *route.split()[:1])
        assert f"{base} has a neighbour entry on flannel.1, and no route" in entries(world, one)[1]
        world.run("node1", "sh", "-c", f"ip route add {route}")
        world.run("node1", "bridge", "fdb", "del", two.mac(), "dev", "flannel.1")
        missing = f"{two.subnet()} has no FDB entry for {two.mac()} on flannel.1"
        assert entries(world, one) == ("wrong", f"of 2 peers: {missing}")
        world.run("node1", "ip", "neigh", "del", str(two.subnet()).partition("/")[0], "dev", "flannel.1")
        state, what = entries(world, one)
        assert (state, "has no neighbour entry for" in what) == ("wrong", True)
    if backend != "wireguard":
        world.run("node1", "ip", "route", "flush", "proto", "111")
        if backend == "vxlan":
            assert entries(world, one)[0] == "wrong"
            world.run("node1", "ip", "link", "del", "flannel.1")
        (found,) = (each for each in doctor(world, one) if each["subject"] == "network")
        assert "nothing stands of the network" in found["what"]


def test_of_two_networks_the_one_that_is_asked_about_is_looked_at(world):
    world.etcd.put(
        "/second/network/config", '{"Network":"10.50.0.0/16","Backend":{"Type":"vxlan","VNI":7,"Port":8473}}'
    )
    one, two = world.nodes(2)
    flags = "--etcd-prefix=/second/network", "--node-name=node1"
    other = world.agent("node1", *flags, run_dir="node1-second").wait_ready()
    one.kill()
    other.kill()
    world.run("node1", "bridge", "fdb", "del", two.mac(), "dev", "flannel.1")
    assert entries(world, one)[0] == "wrong"
    assert entries(world, other) == ("warning", "no peer has any")


def test_where_no_network_was_made_that_is_said(world):
    (agent,) = world.nodes(1)
    agent.stop()
    (agent.run_dir / "subnet.env").unlink()
    (found,) = (each for each in doctor(world, agent) if each["subject"] == "network")
    assert "no agent has made a network here" in found["what"]
