"""Rules of other programs that drop pods' traffic or the tunnel's, or that masquerade what goes from pod to pod."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from lease.families import Family
from lease.model import ip_text
from overlay.control.background import BackgroundController
from overlay.control.controller import Handler, Waiting
from overlay.control.health import Health, few
from overlay.control.inputs import Inputs
from overlay.firewall.nat import TABLE_PREFIX
from overlay.kernel.events import ForeignRulesSeen
from overlay.kernel.netlink import KernelError
from overlay.kernel.nftables import iptables, program
from overlay.kernel.nftables.program import Chain
from overlay.kernel.route.links import client_ports
from overlay.node.standing import backend_in_force
from overlay.reach import filters, iptables_lines, ways
from overlay.reach.filters import Flow, Rule, Verdict

GAP_S, SHARE, MOST_GAP_S = 2.0, 50, 30.0
"""After a change, and a fiftieth of the time at most: kube-proxy changes its rules all day long. On a machine so busy that
this takes long it is looked after MOST_GAP_S all the same."""
CHECK_S, CHECK_LEGACY_S = 300.0, 60.0
"""Without an event; of the old tables there are none."""
DROPS, MASQUERADES, DOUBTFUL, UNREAD = "foreign rules", "foreign masquerade", "doubtful rules", "filters"
"""Subjects of problems; with all but the first pods reach each other, or may."""
PLUGINS = "CNI-"
"""Chains of the bridge plugin begin so: it masquerades where our own network list says ipMasq, as flannel's does without
--ip-masq."""
PEERS = 2
NAMED = 2
"""Whose traffic is tried: rules are about networks, seldom about one peer."""
CHAINS, MOST_ELEMENTS = 64, 5000
"""So many chains of others are read, and sets with so many elements, at most."""
_LEGACY = {"filter": ("FORWARD", "INPUT", "OUTPUT"), "nat": ("PREROUTING", "POSTROUTING")}
"""Base chains of the old tables; each table's kind is its name, each chain's hook too."""
OWN_TABLES = (TABLE_PREFIX, "overlay_trace_")
"""What tables of ours are called by (trace.leftovers: those of a trace)."""
_OLD = "legacy"
"""Stands for a family of nftables, of a chain that iptables-legacy shows."""


class _Wants(NamedTuple):
    """names: of the interfaces of `here`, by number; bridges: those by which pods are attached, by name; port: of the
    tunnel's UDP, 0: it has none."""

    here: ways.Here
    names: Mapping[int, str]
    bridges: tuple[str, ...]
    port: int
    synced: bool


class ForeignRulesController(BackgroundController):
    """Reads them, and reports; changes nothing. (firewall/forward.py sees to forward chains that drop by policy.)"""

    name = "filters"
    reports = (DROPS, MASQUERADES, DOUBTFUL, UNREAD)
    harmless = True
    rechecked = False

    def __init__(
        self,
        family: Family,
        post: Callable[[Any], None],
        health: Health,
        clock: Callable[[], float],
        some_peers: Callable[[int, int], list[ways.Peer]],
    ) -> None:
        """some_peers: as of ReachController."""
        super().__init__(post, health)
        self._family, self._clock, self._some_peers = family, clock, some_peers
        self._next = self._not_before = clock()

    @property
    def handles(self) -> Mapping[type, Handler]:
        """Somebody changed them."""
        return {**super().handles, ForeignRulesSeen: lambda _event: self._soon()}

    def _soon(self) -> bool:
        self._next = min(self._next, max(self._clock() + GAP_S, self._not_before))
        return False

    def wants(self, inputs: Inputs) -> object:
        """Whose packets are tried."""
        number = self._family.number
        here = ways.here_of(inputs, number)
        backend = backend_in_force(inputs, self._family)
        if backend is None or here is None:
            return Waiting("for a lease")
        outer = backend.outer()
        names = {here.tunnel: inputs.tunnels[number].name, here.underlay: inputs.underlays[number].name}
        attached = tuple(inputs.links[index].name for index in here.bridges)
        bridges = attached or tuple(sorted(inputs.bridges)) or ("cni0",)
        return _Wants(here, names, bridges, outer.port if outer is not None else 0, number in inputs.synced_families)

    def reconcile(self, wants: Any) -> bool:
        """Begin to read."""
        legacy = bool(iptables.legacy_tables(self._family.number))
        self._next = self._clock() + (CHECK_LEGACY_S if legacy else CHECK_S)
        if not wants.synced:
            return False
        flows = [flow for peer in self._some_peers(0, PEERS) for flow in flows_of(self._family, wants, peer)]
        return super().reconcile(flows)

    def _work(self, wants: list[Flow]) -> tuple[dict[str, list[str]], float]:
        """What cannot be read is reported, and read again when all is: a back-off would read a node's rules every two
        seconds."""
        began = time.monotonic()
        found: dict[str, dict[str, dict[str, None]]] = {
            subject: {} for subject in (DROPS, MASQUERADES, DOUBTFUL, UNREAD)
        }
        try:
            for _, subject, line, packets in findings(self._family, wants):
                found[subject].setdefault(line, {}).setdefault(packets)  # a set that keeps its order
        except KernelError as error:
            found[UNREAD].setdefault(f"rules of other programs are not checked: {error}", {})
        lines = {
            subject: [line.replace("{these}", few(packets, len(packets), NAMED)) for line, packets in those.items()]
            for subject, those in found.items()
        }
        return lines, time.monotonic() - began

    def _done(self, result: tuple[dict[str, list[str]], float]) -> None:
        found, cost = result
        self._not_before = self._clock() + min(cost * SHARE, MOST_GAP_S)
        for subject, lines in found.items():
            self._health.report(subject, "; ".join(lines), harmless=subject != DROPS, outside=True)

    def due(self) -> float | None:
        """After a change, and now and then."""
        return self._next


def of_node(here: ways.Here, names: Mapping[int, str], bridges: tuple[str, ...], port: int) -> _Wants:
    """What flows are made of, of a node that no agent says anything of."""
    return _Wants(here, names, bridges, port, True)


def flows_of(family: Family, wants: _Wants, peer: ways.Peer) -> Iterator[Flow]:
    """The packets whose way through the filters matters: between pods here and a peer's, and those of the tunnel."""
    names, here = wants.names, wants.here
    beyond = names[here.underlay if peer.direct else here.tunnel]
    us, there = ways.a_pod(here.own), ways.a_pod(peer.subnet)
    for bridge in wants.bridges:
        yield Flow(family.nft, bridge, beyond, us, there, what=f"packets of pods here to {peer.subnet}")
        yield Flow(family.nft, beyond, bridge, there, us, what=f"packets from {peer.subnet} to pods here")
        yield Flow(family.nft, bridge, beyond, us, there, what=f"answers of pods here to {peer.subnet}", answers=True)
        yield Flow(family.nft, beyond, bridge, there, us, what=f"answers from {peer.subnet} to pods here", answers=True)
    if wants.port and not peer.direct:
        lower, public_ip = names[here.underlay], ip_text(family.number, peer.public_ip)
        udp, sports = f"(UDP port {wants.port})", client_ports()
        came = Flow(family.nft, lower, "", peer.public_ip, here.local, "udp", wants.port, sports=sports)
        yield came._replace(what=f"the tunnel from {public_ip} {udp}")
        sent = Flow(family.nft, "", lower, here.local, peer.public_ip, "udp", wants.port, sports=sports)
        yield sent._replace(what=f"the tunnel to {public_ip} {udp}")


def _hooks(flow: Flow) -> Iterator[tuple[str, Flow]]:
    """The hooks that a flow passes, and what is known of it there."""
    if flow.iif:
        yield "ingress", flow._replace(oif="")
        yield "prerouting", flow._replace(oif="")
    if flow.iif and flow.oif:
        yield "forward", flow
    elif flow.iif:
        yield "input", flow
    else:
        yield "output", flow
    if flow.oif:
        yield "postrouting", flow
        yield "egress", flow


def _attached(chain: Chain, flow: Flow) -> bool:
    """Whether a chain of a device is on the flow's way (none whose device is not known); all others are."""
    return chain.hook not in program.BELOW or (flow.oif if chain.hook == "egress" else flow.iif) in chain.devices


def findings(family: Family, flows: list[Flow], reader: Reader | None = None) -> Iterator[tuple[str, str, str, str]]:
    """What drops or masquerades them: the hook ("": none was judged), the problem's subject, what a rule does with {these}
    packets and what to do about it, and which they are. reader: where rules are read that were read already. Raises
    KernelError."""
    reader = reader or Reader(family)
    chains = reader.chains(family.nft, "inet")
    try:
        chains += reader.legacy() if flows else []
    except iptables.NoProgram as missing:
        yield "", UNREAD, f"the old iptables are in use on this node, and they cannot be read: {missing.strerror}", ""
    except KernelError as error:  # nft's are judged all the same
        yield "", UNREAD, f"rules of other programs are not checked: {error}", ""
    chains += reader.chains("netdev")
    for flow in flows:
        for hook, seen in _hooks(flow):
            for chain in chains:
                if chain.hook != hook or not _attached(chain, flow):
                    continue
                verdict = filters.judge(chain, seen, reader.rules, reader.elements)
                if (line := _about(family, chain, seen, verdict)) is not None:
                    yield hook, *line


def findings_below(family: Family, flow: Flow, reader: Reader | None = None) -> Iterator[str]:
    """The same of the rules below IP (families bridge and netdev), at whatever hook: what drops a flow and what to do about
    it. Raises KernelError."""
    reader = reader or Reader(family)
    for chain in reader.chains("bridge", "netdev"):
        if not _attached(chain, flow):
            continue
        verdict = filters.judge(chain, flow, reader.rules, reader.elements)
        if (line := _about(family, chain, flow, verdict)) is not None:
            yield line[1].replace("{these}", flow.what)


def _about(family: Family, chain: Chain, flow: Flow, verdict: Verdict) -> tuple[str, str, str] | None:
    """The problem's subject, what a rule does with {these} packets and what to do about it, and which they are: of one rule
    all are named in one line."""
    inner = not flow.protocol
    where = f"chain {verdict.where}".replace(f"chain {_OLD} ", "iptables-legacy chain ")
    if chain.kind == "nat":
        by_plugin = verdict.where.split()[-1].startswith(PLUGINS)
        if verdict.action in filters.SENDS_ELSEWHERE and chain.hook == "prerouting":
            does = "sends {these} to another address"
        elif not inner or verdict.action not in filters.MASQUERADES or not flow.oif or by_plugin:
            return None
        else:
            does = "masquerades {these}, so that a node's address is seen in place of the pod's"
    elif verdict.action not in filters.DROPS:
        return None
    elif verdict.rule is None:
        if chain.hook == "forward" or not verdict.sure:
            return None  # forward chains that drop by policy are firewall/forward.py's
        does = "drops {these} by its policy"
    else:
        does = "drops {these}"
    rule = verdict.rule
    if not verdict.sure:  # it may be right as it is: no command against it
        return (
            DOUBTFUL,
            f"maybe a rule of {where} {does}; whether one before it lets them through cannot be seen",
            flow.what,
        )
    if rule is None:
        accept = "iptables-legacy -A INPUT" if chain.family == _OLD else f"nft add rule {chain}"
        if flow.port:
            accept += (
                f" -p udp --dport {flow.port} -j ACCEPT" if chain.family == _OLD else f" udp dport {flow.port} accept"
            )
        else:
            of_pods = "the pod network: saddr and daddr"
            accept = f"accept {of_pods}, in that chain"
        return DROPS, f"{where} {does}: {accept}", flow.what
    tool = f"{'iptables' if family.number == 4 else 'ip6tables'}{'-legacy' if chain.family == _OLD else ''}"
    table = verdict.where.split()[1]
    if "text" in rule:
        remove = f"{tool} -t {table} {rule['text'].replace('-A ', '-D ', 1)}"
    else:
        remove = f"nft delete rule {verdict.where} handle {rule.get('handle')}"
    masquerades = chain.kind == "nat" and verdict.action in filters.MASQUERADES
    return (
        MASQUERADES if masquerades else DROPS,
        f"a rule of {where} {does}: {remove}, or an accept before it",
        flow.what,
    )


class Reader:
    """Chains of others, each read once."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._read: dict[tuple[str, str, str], list[Rule] | None] = {}
        self._sets: dict[tuple[str, str, str], list[Any] | None] = {}
        self._chains: list[Chain] | None = None

    def chains(self, *families: str) -> list[Chain]:
        """The base chains of others in nftables' families. Raises KernelError."""
        if self._chains is None:
            self._chains = [chain for chain in program.all_base_chains() if not chain.table.startswith(OWN_TABLES)]
        return [chain for chain in self._chains if chain.family in families]

    def elements(self, family: str, table: str, name: str) -> list[Any] | None:
        """Those of a named set or map, as nft lists them; None where it has too many, or cannot be read."""
        key = family, table, name
        if key not in self._sets:
            self._sets[key] = (
                program.elements_of(family, table, name, MOST_ELEMENTS) if len(self._sets) < CHAINS else None
            )
        return self._sets[key]

    def legacy(self) -> list[Chain]:
        """The base chains of the old tables that are in use. Raises KernelError, NoProgram."""
        found = []
        for table in iptables.legacy_tables(self._family.number):
            for name in _LEGACY.get(table, ()):
                lines = iptables.chain_lines(self._family.number, table, name)
                self._read[_OLD, table, name] = iptables_lines.rules(lines, self._family.nft)
                found.append(Chain(_OLD, table, name, iptables_lines.policy(lines), table, name.lower()))
        return found

    def rules(self, family: str, table: str, name: str) -> list[Rule] | None:
        """A chain's rules; None of one that went meanwhile, or of one too many. Raises KernelError."""
        key = family, table, name
        if key not in self._read:
            self._read[key] = self._rules(*key) if len(self._read) < CHAINS else None
        return self._read[key]

    def _rules(self, family: str, table: str, name: str) -> list[Rule] | None:
        lines = partial(iptables.chain_lines, self._family.number, table, name)
        try:
            if family == _OLD:
                return iptables_lines.rules(lines(), self._family.nft)
            found = program.rules_of(family, table, name)
        except KernelError as error:
            if "No such file" in str(error) or "No chain" in str(error):
                return None
            raise
        if any(list(each) == ["xt"] for rule in found for each in rule.get("expr", ())):
            try:
                return iptables_lines.rules(lines(by_nft=True), self._family.nft)
            except KernelError:
                return found
        return found
