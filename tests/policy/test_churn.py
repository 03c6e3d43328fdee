"""Pods come and go, a hundred a minute, policies change, and all agents are replaced one after the other: never one packet of
what is forbidden, and none lost of what is allowed."""

from __future__ import annotations

import itertools
import signal
import time

import pytest

from overlay.cni.lists import CONFLIST
from overlay.lab import netns, pods
from tests.policy.test_enforcing import FROM_B, Datagrams, Leak, asks
from tests.support.probing import Field
from tests.support.wait import until

EACH_S = 0.6
"""A hundred a minute."""
ALLOWED = 7001
PODS = 36
ROLLING = [[{"port": 80}], [{"port": 80}, {"port": 81}]]
"""What policies change between, beside what is allowed all the time."""


@pytest.mark.timeout(300)
def test_churn_and_a_rolling_update(kube, field: Field):
    kube.begin(2)
    kube.namespaces(x={"team": "one"}, y={"team": "two"})
    one, two = kube.agents
    for agent, name in ((one, "a"), (two, "b"), (one, "c"), (two, "d")):
        for end in kube.pod_of_api(agent, "x", name, app=name):
            for protocol in ("TCP", "UDP"):
                field.serve(end, protocol, 80)
    kube.pods_settled(field)
    kube.policy(with_ports(ROLLING[0]))
    until(
        "it is enforced",
        lambda: asks(kube, field, "x/b", "x/a") == [True, False] * 2 and not any(asks(kube, field, "x/c", "x/a")),
    )
    streams = [Datagrams(a, b, ALLOWED) for a, b in zip(kube.ends["x/b"], kube.ends["x/a"], strict=True)]
    leaks = [Leak(a, b) for source in ("x/c", "x/d") for a, b in zip(kube.ends[source], kube.ends["x/a"], strict=True)]
    agents = {"node1": one, "node2": two}
    replaced: list[str] = []
    began = time.monotonic()
    for number, node in zip(range(PODS), itertools.cycle(agents)):
        name = f"churn{number}"
        ends = kube.pod_of_api(
            agents[node], "y", name, app=("b", "z")[number % 2]
        )  # another namespace: "b" may not either
        if number % 6 == 5:
            kube.kube.ask(
                "PATCH", PATH, {"spec": with_ports(ROLLING[number // 6 % 2])["spec"]}, "application/merge-patch+json"
            )
        if number in (10, 20):  # as a DaemonSet is updated
            which = ("node1", "node2")[number // 20]
            agents[which] = kube.restart(agents[which], "--ip-masq", kube.results(which))
            replaced.append(which)
        if number == 30:  # and as the kernel ends one that has too little memory
            agents["node1"].stop(signal.SIGKILL)
            agents["node1"] = kube.restart(agents["node1"], "--ip-masq", kube.results("node1"))
        remove(kube, agents[node], "y", name, ends[0].namespace)
        time.sleep(max(0.0, began + (number + 1) * EACH_S - time.monotonic()))
    assert replaced == ["node1", "node2"]
    for agent in agents.values():
        agent.wait_ready()
        until("it knows them still", lambda agent=agent: agent.status()["policy"]["enforced"])
        until("those that went are gone", lambda agent=agent: agent.status()["policy"]["pods"] == 4)
    assert asks(kube, field, "x/b", "x/a")[0], "TCP 80 is allowed all the time"
    assert not any(asks(kube, field, "x/c", "x/a"))
    for leak in leaks:
        assert leak.ended() == 0, "never one packet of what is forbidden"
    for stream in streams:
        assert stream.ended() == 0, "never one lost of what is allowed"


PATH = "/apis/networking.k8s.io/v1/namespaces/x/networkpolicies/from-b"


def with_ports(ports) -> dict:
    rule = {**FROM_B["spec"]["ingress"][0], "ports": [*ports, {"protocol": "UDP", "port": ALLOWED}]}
    return {**FROM_B, "apiVersion": "networking.k8s.io/v1", "spec": {**FROM_B["spec"], "ingress": [rule]}}


def remove(kube, agent, namespace: str, name: str, where: str) -> None:
    """As a kubelet does it: the API's pod goes last."""
    cache = pods.Cache(kube.folder / f"{agent.node}-results", namespace, name)
    pods.detach(kube.namespace(agent.node), agent.run_dir / "cni" / CONFLIST, where, cache)
    netns.delete(where)
    kube.ends.pop(f"{namespace}/{name}", None)
    kube.kube.ask("DELETE", f"/api/v1/namespaces/{namespace}/pods/{name}?gracePeriodSeconds=0")
