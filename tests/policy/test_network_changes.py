"""The network changes under policies: tables are named by it, and those of the one before go last."""

from __future__ import annotations

from functools import partial

import pytest

from tests.policy.test_enforcing import FROM_B, Leak, asks
from tests.support.probing import Field
from tests.support.wait import until


@pytest.mark.timeout(300)
def test_another_vni_lets_no_forbidden_packet_pass(kube, field: Field):
    """Live, and with agents that are started anew, as a DaemonSet is that comes with its ConfigMap; and with a family less at
    the same time."""
    kube.keeps_families = True
    kube.begin(2)
    kube.namespaces(x={"team": "one"})
    one, two = agents = list(kube.agents)
    for agent, name in ((one, "a"), (two, "b"), (one, "c")):
        for end in kube.pod_of_api(agent, "x", name, app=name):
            for protocol in ("TCP", "UDP"):
                field.serve(end, protocol, 80)
    kube.pods_settled(field)
    kube.policy(FROM_B)
    until("it is enforced", lambda: asks(kube, field, "x/b", "x/a")[0] and not any(asks(kube, field, "x/c", "x/a")))
    leaks = [Leak(a, b) for a, b in zip(kube.ends["x/c"], kube.ends["x/a"], strict=True)]
    for vni, live in ((2, True), (3, False), (4, True)):
        if not live:
            for agent in agents:
                agent.stop()
        kube.keeps_families = vni < 4
        kube.config(Backend={"Type": "vxlan", "VNI": vni})
        if not live:
            agents = [kube.restart(agent, "--ip-masq", kube.results(agent.node)) for agent in agents]
        for agent in agents:
            until("it has the device", partial(has_device, agent, vni), 40)
            until("all is enforced", lambda agent=agent: agent.status()["policy"]["enforced"], 40)
            until("nothing is left", partial(is_left, kube, agent.node, vni - 1), 40)
            until("and all is well", lambda agent=agent: agent.ready() and agent.problems() == {}, 40)
            until("the file names it alone", partial(is_named, agent, vni))
            assert agent.events("policy.mended") == agent.events("nat.mended") == agent.events("guard.mended") == []
        until("b reaches a", lambda: asks(kube, field, "x/b", "x/a")[0], 40)
        assert not any(asks(kube, field, "x/c", "x/a"))
    for leak in leaks:
        assert leak.ended() == 0


def has_device(agent, vni: int) -> bool:
    return agent.status()["device"]["vni"] == vni


def is_named(agent, vni: int) -> bool:
    return (agent.run_dir / "device").read_text() == f"flannel.{vni}"


def is_left(kube, node: str, vni: int) -> bool:
    """Whether a node has no table and no device of a network."""
    tables = kube.run(node, "nft", "list", "tables").split()
    links = kube.run(node, "ip", "-br", "link").split()
    named = (f"overlay-{vni}", f"flannel.{vni}", f"flannel-v6.{vni}")
    return not any(word.startswith(named) for word in (*tables, *links))
