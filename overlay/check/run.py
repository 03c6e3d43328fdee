"""The ladder of probes, the kernel's look-ups and the far side's word, and the verdict they make."""

from __future__ import annotations

from typing import Any, NamedTuple

from lease.families import FAMILIES, Family
from lease.model import ip_number, ip_text, mac_text, prefix
from overlay.api.family import family_of, has_vteps, network_of
from overlay.check import far_side
from overlay.check.refused import refused_record
from overlay.kernel import arp
from overlay.kernel.netlink import RequestSocket
from overlay.kernel.route.entries import Address, Link
from overlay.node.interfaces import gateway_holders
from overlay.probes import ladder
from overlay.probes import verdict as verdicts
from overlay.probes.ladder import Asked, Rung
from overlay.probes.mesh import INTERVAL_S
from overlay.probes.verdict import Kind, Outcome, State, Verdict, judge, of_size
from overlay.reach import ways
from overlay.reach.causes import Causes

MOST = 200
"""So many peers are asked where none is named."""
NAMES = {
    Kind.UNDERLAY: "underlay",
    Kind.UNDERLAY_FULL: "underlay {mtu}",
    Kind.VTEP: "VTEP",
    Kind.VTEP_FULL: "VTEP {mtu}",
}
NUD_FAILED = 32
"""include/uapi/linux/neighbour.h: nobody answered."""
LATELY_S = 30
ASKED_BY_ARP = 3
"""Peers at most of which that is asked: it takes a second each."""
GATEWAY, POD, POD_FULL = "pods' gateway", "pod", "pod {mtu}"


class Unknown(Exception):
    """One line: what was asked about is not there."""


class RefusedRecord(Exception):
    """One line: its record is there and not used, and why."""


class NotYet(Exception):
    """One line: this node cannot ask anybody."""


class Goal(NamedTuple):
    """What is asked about. peer: of the status; pod: an address of it, 0: none was given."""

    peer: dict[str, Any]
    pod: int = 0

    @property
    def text(self) -> str:
        """The pod's address."""
        return ip_text(prefix(self.peer["subnet"]).family, self.pod)


def resolve(target: str | None, found: dict[str, Any]) -> tuple[list[Goal], int]:
    """The peers that are meant; or an address of this node's own subnet. Raises Unknown, RefusedRecord, NotYet."""
    peers = found["peers"]
    if not found["device"] or not found["lease"]:
        raise NotYet("this node has no lease or no device yet: overlay status says what it waits for")
    if target is None:
        return [Goal(peer) for peer in peers[:MOST]], 0
    named = [peer for peer in peers if target in (peer["node_name"], peer["public_ip"], peer["subnet"])]
    if named:
        return [Goal(named[0])], 0
    refused = refused_record(found, target)
    try:
        address = ip_number(target, family_of(found).number)
    except ValueError:
        if refused is not None:
            raise RefusedRecord(f"{target}: {refused}") from None
        names = sorted({peer["node_name"] for peer in peers} - {""})
        some = f" (nodes: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else ""
        raise Unknown(f"{target}: no peer has that name, public IP or subnet, and it is no address{some}") from None
    if prefix(found["lease"]["subnet"]).holds(address):
        return [], address
    holding = [peer for peer in peers if prefix(peer["subnet"]).holds(address)]
    if holding:
        subnet = prefix(holding[0]["subnet"])
        return [Goal(holding[0], address if address != subnet.base else 0)], 0
    if refused is not None:
        raise RefusedRecord(f"{target}: {refused}")
    network = network_of(found)
    where = (
        f"in Network {network}, but in no peer's subnet: no node holds it"
        if network.holds(address)
        else f"outside of Network {network}"
    )
    raise Unknown(f"{target} is {where}")


# --- asking


def _rungs(found: dict[str, Any], goal: Goal, addresses: list[Address]) -> list[Rung]:
    device, under = found["device"]["mtu"], found["underlay"]["mtu"]
    mtu = under if goal.peer["path"] == "direct" else device
    family = family_of(found)
    subnet, public_ip = prefix(goal.peer["subnet"]), ip_number(goal.peer["public_ip"], family.number)
    made = [
        Rung(NAMES[Kind.UNDERLAY], public_ip),
        Rung(NAMES[Kind.UNDERLAY_FULL].format(mtu=under), public_ip, under),
    ]
    source = 0
    if has_vteps(found):
        made += [Rung(NAMES[Kind.VTEP], subnet.base), Rung(NAMES[Kind.VTEP_FULL].format(mtu=mtu), subnet.base, mtu)]
    else:  # from our pods' gateway where there is one: the answers come by the way of pods' packets
        own = prefix(found["lease"]["subnet"])
        source = own.base + 1 if gateway_holders(own, addresses) else 0
        made += [Rung(GATEWAY, subnet.base + 1, 0, source), Rung(f"{GATEWAY} {mtu}", subnet.base + 1, mtu, source)]
    if goal.pod:
        made += [Rung(GATEWAY, subnet.base + 1, 0, source)] if has_vteps(found) else []
        pods = pods_mtu(found)
        made += [Rung(POD, goal.pod, 0, source), Rung(POD_FULL.format(mtu=pods), goal.pod, pods, source)]
    return made


def pods_mtu(found: dict[str, Any]) -> int:
    """Of pods, which is that of the family with the smaller one."""
    return int(found.get("pods_mtu") or found["device"]["mtu"])


def ask_all(found: dict[str, Any], goals: list[Goal]) -> list[dict[str, Any]]:
    """Of one family. found: its view of the status (api.family)."""
    family = family_of(found)
    requests = RequestSocket()
    try:
        links, addresses = {link.ifindex: link for link in requests.links()}, requests.addresses(family)
        rungs = [_rungs(found, goal, addresses) for goal in goals]
        asked = ladder.ask(family, [rung for those in rungs for rung in those]) if goals else []
        results = []
        for goal, those in zip(goals, rungs, strict=True):
            mine, asked = asked[: len(those)], asked[len(those) :]
            wrong = _look_up(requests, found, goal, links, addresses)
            silent = len(goals) <= ASKED_BY_ARP and not any(each.outcome.answered for each in mine)
            nearby = _nearby(requests, found, goal, links, silent)
            results.append(_result(found, goal, those, mine, wrong, nearby))
        return results
    finally:
        requests.close()


def _look_up(
    requests: RequestSocket, found: dict[str, Any], goal: Goal, links: dict[int, Link], addresses: list[Address]
) -> list[str]:
    """What of the kernel's ways to and from a peer is not as it should be; each with its cause."""
    family = family_of(found)
    own, index = prefix(found["lease"]["subnet"]), {link.name: number for number, link in links.items()}
    by_key = {(each.oif, each.address, each.length): each for each in addresses}
    lower = index.get(found["underlay"]["interface"], 0)
    tunnel = index.get(found["device"]["name"], 0)
    if not tunnel:
        return [f"{found['device']['name']} is not there"]
    under = links.get(lower)
    if under is not None and not (under.up and under.carrier):
        state = "is down" if not under.up else "has no carrier"
        return [f"{under.name}, which leads to peers, {state}"]
    here = ways.Here(
        own,
        tunnel,
        lower,
        ip_number(found["device"]["local"], family.number),
        ways.bridges_of(own, links, by_key),
        found["device"]["port"],
    )
    subnet = prefix(goal.peer["subnet"])
    peer = ways.Peer(subnet, ip_number(goal.peer["public_ip"], family.number), goal.peer["path"] == "direct")
    network = network_of(found)
    causes = Causes(family, requests, network, {number: name for name, number in index.items()})
    asked = ((question, requests.way(family, question.packet)) for question in ways.questions(here, peer))
    return [
        f"{question.what.format(peer=subnet)} {causes.happens(question, way)}: {causes.cause(question, way)}"
        for question, way in asked
        if not ways.is_as_asked(question, way)
    ]


def _result(
    found: dict[str, Any], goal: Goal, rungs: list[Rung], asked: list[Asked], wrong: list[str], nearby: str
) -> dict[str, Any]:
    """nearby: what the kernel's neighbour table says against the peer's public IP, "" where nothing."""
    by_kind = {kind: each.outcome for kind, each in zip(Kind, asked, strict=False)}
    verdict = judge(by_kind, found["device"]["port"], _known(found, goal))
    if verdict.state is State.PATH_MTU and not by_kind[Kind.VTEP_FULL].refused:
        full = rungs[Kind.VTEP_FULL]
        largest = ladder.largest(family_of(found), full.address, full.mtu) or 0
        verdict = of_size(verdict, largest, gateway=not has_vteps(found))
    if wrong:
        all_pass = all(each.outcome.ok for each in asked)
        answered = "pings of this node are answered, but " if all_pass else ""
        verdict = Verdict(
            State.REFUSED, f"{answered}this node's own kernel: {wrong[0]}", "take away or mend what that line names"
        )
    elif not goal.peer["ok"]:
        verdict = Verdict(
            State.REFUSED, f"this node lacks {', '.join(goal.peer['missing'])} of it", "overlay status says why"
        )
    elif goal.pod:
        verdict = _with_pod(verdict, goal, [each.outcome for each in (asked[-3], *asked[-2:])])
    if verdict.state is not State.OK and nearby:
        verdict = verdict._replace(text=f"{verdict.text}; {nearby}")
    far = far_side.said(found, goal.peer, silent=verdict.state is State.OK)
    if verdict.state is State.OK and far.problem and not goal.pod:
        node = goal.peer["node_name"] or goal.peer["public_ip"]
        text = f"answers pings, but {node} has a problem that its pods may meet: {far.problem}"
        verdict = Verdict(
            State.UNREACHABLE, text, f"mend that; overlay check one of its pods; on {node}: overlay status"
        )
    peer = {name: goal.peer[name] for name in ("node_name", "public_ip", "subnet", "path")}
    target = ip_text(family_of(found).number, goal.pod) if goal.pod else goal.peer["subnet"]
    return {**_as_json(target, peer, verdict, wrong, rungs, asked), "far_side": far.lines}


def _as_json(
    target: str, peer: dict[str, Any] | None, verdict: Verdict, wrong: list[str], rungs: list[Rung], asked: list[Asked]
) -> dict[str, Any]:
    return {
        "target": target,
        "peer": peer,
        "state": verdict.state.name.lower(),
        "verdict": verdict.text,
        "remedy": verdict.remedy,
        "look_ups": wrong,
        "far_side": [],
        "probes": [
            _probe(FAMILIES[6 if ":" in target else 4], rung, each) for rung, each in zip(rungs, asked, strict=True)
        ],
    }


def _probe(family: Family, rung: Rung, asked: Asked) -> dict[str, Any]:
    return {
        "name": rung.name,
        "address": ip_text(family.number, rung.address),
        "packet_bytes": rung.mtu or None,
        "sent": asked.outcome.sent,
        "answered": asked.outcome.answered,
        "rtt_us": asked.rtt_us,
        "refused": asked.outcome.refused,
    }


def _nearby(requests: RequestSocket, found: dict[str, Any], goal: Goal, links: dict[int, Link], silent: bool) -> str:
    """What is wrong with a peer's entry among the neighbours, "": nothing. silent: the peer answered no ping; then
    it is asked anew by ARP, since what it asks of us itself keeps its entry alive."""
    lower = next((index for index, link in links.items() if link.name == found["underlay"]["interface"]), 0)
    family = family_of(found)
    there = {each.address: each for each in requests.neighbours(family, lower)} if lower else {}
    address = ip_number(goal.peer["public_ip"], family.number)
    its = there.get(address)
    if its is None:
        return ""
    interface = found["underlay"]["interface"]
    if its.state & NUD_FAILED or (silent and family.by_arp and _nobody(interface, address)):
        asks = "ARP" if family.by_arp else "neighbour discovery"
        return f"nobody answers {asks} for {goal.peer['public_ip']} on {interface}"
    others = (each["public_ip"] for each in found["peers"] if each["public_ip"] != goal.peer["public_ip"])
    same = next(
        (
            other
            for other in others
            if (o := there.get(ip_number(other, family.number))) is not None and o.mac == its.mac
        ),
        "",
    )
    if its.mac and same:
        return f"{goal.peer['public_ip']} and {same} are of one MAC, {mac_text(its.mac)}: has a machine both?"
    return ""


def _nobody(interface: str, address: int) -> bool:
    try:
        return arp.probe(interface, address) is None
    except OSError:
        return False  # it could not be asked


def _with_pod(verdict: Verdict, goal: Goal, asked: list[Outcome]) -> Verdict:
    """What is known with what its pods answered. asked: the gateway, the pod, the same by packets of full size."""
    gateway, small, full = asked
    if verdict.state is State.OK or (verdict.state is State.UNTRIED and small.ok):
        return _of_pod(goal, asked)
    node = goal.peer["node_name"] or goal.peer["public_ip"]
    if full.ok:
        return Verdict(
            State.OK,
            f"the pod answers, though {node} itself does not: it answers no pings (icmp_echo_ignore_all, a filter of ICMP),"
            " or some flows pass the tunnel and others do not (a filter of UDP source ports, one of several ways)",
            "overlay doctor there; overlay trace, some times",
        )
    if verdict.state is State.UNREACHABLE and (gateway.ok or small.ok):
        return verdict._replace(
            text="some packets pass the tunnel and others do not: a filter of UDP source ports, a lossy link, or one of"
            f" several ways that is broken ({verdict.text})"
        )
    return verdict


def _known(found: dict[str, Any], goal: Goal) -> verdicts.Peer:
    """What the agent knows of it. Heard is one that was heard lately, an interval after its last answer: it was asked in
    between. (A peer that went away a moment ago may well have been heard after its last answer.)"""
    direct, gateway = goal.peer["path"] == "direct", not has_vteps(found)
    for each in found.get("reachability", ()):
        if each["subnet"] == goal.peer["subnet"]:
            heard, answered = each["heard_age_s"], each["answered_age_s"]
            lately = heard is not None and heard < LATELY_S and (answered is None or answered - heard >= INTERVAL_S)
            return verdicts.Peer(direct, gateway, lately, proven=heard is not None or answered is not None)
    return verdicts.Peer(direct, gateway, proven=False)


def _of_pod(goal: Goal, asked: list[Outcome]) -> Verdict:
    """What is behind a way to the node that is whole."""
    gateway, small, full = asked
    node, pod = goal.peer["node_name"] or goal.peer["public_ip"], goal.text
    if full.ok:
        return Verdict(State.OK, "answers")
    if small.refused:
        return Verdict(
            State.REFUSED,
            f"the way to {node} is whole, but this node's own kernel does not send to the pod: {small.refused}",
            f"ip route get {pod}; ip rule",
        )
    if small.ok and small.answered < small.sent:
        return Verdict(
            State.UNREACHABLE,
            f"the way to {node} is whole, but packets to the pod are lost there, small ones as well: {small.answered} of"
            f" {small.sent} were answered, of full-size ones {full.answered}",
            "overlay trace says where",
        )
    if small.ok:
        return Verdict(
            State.PATH_MTU,
            "the pod answers small packets, not full-size ones, though its node does: its interface has another MTU, or a"
            " rule of that node drops by length or rate",
            f"overlay trace; on {node}: ip link show; FLANNEL_MTU in subnet.env, and the pods' bridge",
        )
    if not gateway.ok:
        return Verdict(
            State.UNREACHABLE,
            f"the way to {node} is whole, but neither the gateway of its pods nor the pod answers: no pod was made there"
            " yet, or its bridge is down, or another filter drops them",
            f"on {node}: overlay check {pod}; overlay status",
        )
    return Verdict(
        State.UNREACHABLE,
        f"the way to {node} is whole, and its pods' gateway answers; the pod does not: it is down or drops pings, or"
        f" {node} does not forward to it (forwarding of the bridge, a filter, a policy)",
        f"on {node}: overlay check {pod}",
    )


def local(found: dict[str, Any], address: int) -> dict[str, Any]:
    """A pod of this node."""
    mtu = pods_mtu(found)
    rungs = [Rung(POD, address), Rung(POD_FULL.format(mtu=mtu), address, mtu)]
    asked = ladder.ask(family_of(found), rungs)
    if asked[1].outcome.ok:
        verdict = Verdict(State.OK, "answers this node; overlay trace shows the way of packets from others")
        if found["problems"]:
            verdict = Verdict(State.OK, "answers this node; what comes from others may meet this node's problems")
    elif asked[0].outcome.ok:
        verdict = Verdict(
            State.PATH_MTU, "answers small packets, not full-size ones", "ip link show, of the bridge and its ports"
        )
    else:
        refused = f" ({asked[0].outcome.refused})" if asked[0].outcome.refused else ""
        verdict = Verdict(
            State.UNREACHABLE,
            f"the pod does not answer its own node{refused}: it is down, has no such address, or drops pings",
            "kubectl get pod -o wide; ip neigh show (is it there, with which MAC?); overlay status",
        )
    return _as_json(ip_text(family_of(found).number, address), None, verdict, [], rungs, asked)
