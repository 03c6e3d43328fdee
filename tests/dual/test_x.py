import json, time
from tests.support.wait import until
from overlay.lab import pods, netns
from overlay.lab.matrix import Wires


def test_x(world):
    world.config(EnableIPv6=True, IPv6Network="fd00:10:244::/48")
    agents = []
    for n in (1, 2, 3):
        node = world.node(n, (4, 6))
        agents.append(world.agent(node, f"--node-name=node{n}"))
    for a in agents:
        a.wait_ready()
    ends = [e for a in agents for e in world.pod_ends(a, "p")]
    time.sleep(3)
    for a in agents:
        print(a.status()["problems"])
    with Wires(ends) as w:
        for c in w.all():
            print(c)
    print(world.run("node1", "nft", "list", "ruleset"))
