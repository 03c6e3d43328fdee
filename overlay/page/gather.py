"""Asks the agents of other nodes, many at once."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from overlay.api.family import primary
from overlay.ask.client import NoAnswer, ask_agent, path_of, secret_in
from overlay.page.cluster import cluster, sample
from overlay.page.summary import summary

AT_ONCE, DEADLINE_S = 16, 8.0
ROUTE = "/summary"


def route(status: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    """The answer to ROUTE. words: `of`: subnets, with commas between them."""
    return summary(status, words.get("of", "").split(","))


def gather(found: Mapping[str, Any]) -> dict[str, Any]:
    """The cluster as this node and those it can ask see it. found: its agent's status."""
    whole, found = found, primary(found)
    peers = found["peers"]
    others = second_subnets(whole)
    mine = summary(whole, ())
    asked = sample(mine, peers, random.Random())  # noqa: S311 (who is shown, where not all can be)
    subnets = [peer["subnet"] for peer in asked]
    subnets += [six for peer in asked if (six := others.get(peer["subnet"]))]
    own = summary(whole, subnets)
    ours = [each for each in (own["subnet"], own["subnet_ipv6"]) if each]
    names = [*ours, *subnets]
    answers = _ask_all(found, asked, names)
    return cluster(own, found, answers, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), others)


def second_subnets(whole: Mapping[str, Any]) -> dict[str, str]:
    """Of each peer's IPv4 subnet that of IPv6, by the node that has both; empty in a network of one family."""
    six = {peer["node_name"]: peer["subnet"] for peer in whole.get("peers_ipv6") or () if peer["node_name"]}
    found = ((peer["subnet"], six.get(peer["node_name"])) for peer in whole["peers"])
    return {subnet: other for subnet, other in found if other}


def _ask_all(
    found: Mapping[str, Any], peers: list[Mapping[str, Any]], subnets: list[str]
) -> dict[str, Mapping[str, Any] | str]:
    asking = found.get("asking")
    if not asking:
        return dict.fromkeys(
            (peer["subnet"] for peer in peers), "agents do not ask each other here (--ask-secret-file)"
        )
    try:
        secret = secret_in(asking["secret_file"])
    except NoAnswer as error:
        return dict.fromkeys((peer["subnet"] for peer in peers), str(error))
    path = path_of(ROUTE, {"of": ",".join(subnets)})

    def ask(peer: Mapping[str, Any]) -> Mapping[str, Any] | str:
        vtep = peer["subnet"].partition("/")[0]
        try:
            return ask_agent((vtep, peer["public_ip"]), asking["port"], secret, path)
        except NoAnswer as error:
            return str(error)

    pool = ThreadPoolExecutor(AT_ONCE, "ask")
    futures: dict[str, Future[Mapping[str, Any] | str]] = {peer["subnet"]: pool.submit(ask, peer) for peer in peers}
    wait(futures.values(), DEADLINE_S)
    pool.shutdown(wait=False, cancel_futures=True)
    return {
        subnet: future.result() if future.done() and not future.cancelled() else "no answer in time"
        for subnet, future in futures.items()
    }
