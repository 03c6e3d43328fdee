"""Policies: loading them, one label's change, and what a packet costs: `.venv/bin/python -m bench.policy [--pods 10000
--policies 1000 --local 203]`.

The objects are made up, as JSON of the API; compiled and committed in a namespace of its own, as the agent does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from bench import rig
from lease.kube.changes import Changed, Listed
from lease.model import prefix
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.lab import netns
from overlay.policy.cluster import Cluster
from overlay.policy.compile import compile_node, with_pods
from overlay.policy.feeds import NAMESPACES, PODS, POLICIES
from overlay.policy.resources import namespace_of, pod_of, policy_of
from overlay.policy.sharing import Sharing
from overlay.policy.table import Maker, table

T = TypeVar("T")
CHANGES = 40
TIERS = ("web", "db", "cache")


def pods(count: int, local: int) -> list[dict[str, Any]]:
    """Fifty apps in a hundred namespaces, in Deployments of five pods, over nodes of 100; the first are node0's."""
    made = []
    for number in range(count):
        node = 0 if number < local else 1 + number // 100
        address = f"10.{node >> 8}.{node & 255}.{number % 250 + 2}"
        made.append({
            "metadata": {
                "namespace": f"ns{number % 100}", "name": f"pod{number}",
                "labels": {
                    "app": f"app{number // 100 % 50}",
                    "tier": TIERS[number // 5 % 3],
                    "pod-template-hash": f"{number // 5:010}",
                },
            },
            "spec": {"nodeName": f"node{node}", "containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": address}]},
        })  # fmt: skip
    return made


def policies(count: int) -> list[dict[str, Any]]:
    """Each of one app of one namespace: from two tiers, from a whole namespace, from a block; some ports."""
    return [
        {
            "metadata": {"namespace": f"ns{number % 100}", "name": f"policy{number}"},
            "spec": {
                "podSelector": {"matchLabels": {"app": f"app{number // 100 % 50}"}},
                "ingress": [
                    {
                        "from": [
                            {"podSelector": {"matchLabels": {"tier": ("web", "db")[number % 2]}}},
                            {"namespaceSelector": {"matchLabels": {"team": f"team{number % 50}"}}},
                            {
                                "ipBlock": {
                                    "cidr": f"172.{number % 16 + 16}.0.0/16",
                                    "except": [f"172.{number % 16 + 16}.5.0/24"],
                                }
                            },
                        ],
                        "ports": [{"port": 8080}, {"port": "http"}, {"port": 9000 + number % 5, "endPort": 9100}],
                    }
                ],
            },
        }
        for number in range(count)
    ]


def timed(what: str, act: Callable[[], T]) -> T:
    """Do it, and say how long it took."""
    began = time.perf_counter()
    found = act()
    print(f"{what:<44} {time.perf_counter() - began:7.3f} s")
    return found


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pods", type=int, default=10_000)
    arguments.add_argument("--policies", type=int, default=1000)
    arguments.add_argument("--local", type=int, default=203)
    given = arguments.parse_args()
    print(rig.machine())
    every, wanted = pods(given.pods, given.local), policies(given.policies)
    texts, policy_texts = [json.dumps(each) for each in every], [json.dumps(each) for each in wanted]
    name = f"overlay-t{os.getpid()}x-bench"
    netns.create(name)
    try:
        nft = netns.inside(name, NetfilterSocket)
        measure(nft, texts, policy_texts)
        nft.close()
    finally:
        netns.delete(name)


def rss_mib() -> float:
    """Of this process, now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / (1 << 20)


def measure(nft: NetfilterSocket, texts: list[str], policy_texts: list[str]) -> None:
    """All of it."""
    before, sharing = rss_mib(), Sharing()
    cluster = Cluster("node0", alone=False)
    read = timed(
        "pods read from JSON",
        lambda: {f"{p.namespace}/{p.name}": p for p in map(sharing.shared, map(pod_of, map(json.loads, texts)))},
    )
    rules = timed(
        "policies read from JSON",
        lambda: {p.key: p for p in map(sharing.policy, map(policy_of, map(json.loads, policy_texts)))},
    )
    labels = {
        f"ns{n}": namespace_of({"metadata": {"name": f"ns{n}", "labels": {"team": f"team{n % 50}"}}})
        for n in range(100)
    }
    cluster.take(Listed(POLICIES, 1, rules))
    cluster.take(Listed(NAMESPACES, 1, labels))
    listed = Listed(PODS, 1, read)
    timed("taken in", partial(cluster.take, listed))
    del read, rules, listed
    maker, subnets, which = Maker(), (prefix("10.0.0.0/24"),), table(1)

    def compiled() -> Any:
        return compile_node(cluster.index, cluster.policies, "node0", (4,))

    found = timed("compiled", compiled)
    cluster.taken()
    content = timed("made a table's content", lambda: maker.content(found, subnets, 1))
    timed("committed", lambda: nft.change_content(which, None, content))
    print(f"sets {len(content.sets)}, elements {sum(len(e.keys) + len(e.chains) for e in content.sets.values())}, "
          f"rules {sum(len(c.rules) for c in content.chains.values())}")  # fmt: skip
    print(f"memory of it: {rss_mib() - before:.1f} MiB")
    took = []
    pick = random.Random(1)
    for _ in range(CHANGES):
        place = pick.randrange(len(texts))
        pod = json.loads(texts[place])
        pod["metadata"]["labels"]["tier"] = pick.choice(["web", "db", "cache"])
        key = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        began = time.perf_counter()
        cluster.take(Changed(PODS, 2, {key: pod_of(pod)}))
        found = compiled() if cluster.whole else with_pods(found, cluster.index, cluster.changes)
        cluster.taken()
        wanted = maker.content(found, subnets, 1)
        nft.change_content(which, content, wanted)
        took.append(time.perf_counter() - began)
        content = wanted
    print(
        f"a label's change, in the kernel: median {statistics.median(took) * 1000:.1f} ms, most {max(took) * 1000:.1f} ms"
    )
    timed("read whole again", lambda: nft.read_content(which, content))


if __name__ == "__main__":
    main()
