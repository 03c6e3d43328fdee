"""Policies made so in the kernel: one table, changed by its difference, and its generation."""

from __future__ import annotations

import errno
import queue
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from lease.families import FAMILIES
from lease.kube.changes import Changed, Listed
from lease.model import Prefix
from overlay.cni.results import CniResult
from overlay.cni.watch import PodsAttached
from overlay.control.controller import Controller, Handler, NotYet, Waiting
from overlay.control.health import NOT_ENFORCED, Health
from overlay.control.inputs import CurrentInputs, Inputs, Policed
from overlay.control.schedule import Cadence
from overlay.kernel.events import NftSeen, Overrun
from overlay.kernel.netlink import KernelError
from overlay.kernel.nftables.content import Content, Table, takes_away
from overlay.kernel.nftables.marks import clear_marks
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.node.interfaces import gateways_on
from overlay.node.owned import Owned
from overlay.node.standing import network_in_force
from overlay.policy.cluster import Cluster
from overlay.policy.compile import NOTHING, Compiled, compile_node, with_pods
from overlay.policy.counts import Counts
from overlay.policy.feeds import CLUSTER_WIDE, CONTRACTS, PODS, POLICIES, RESOURCES, Absent, Down
from overlay.policy.generations import FORWARD, LAST_GENERATION, MARK_MASK, forward, generation_of, slot_of, unmarked
from overlay.policy.groups import KIND as GROUP_KIND
from overlay.policy.groups import OFF
from overlay.policy.model import CLUSTER_KIND
from overlay.policy.nodes import Nodes
from overlay.policy.problems import REFUSED, UNREAD, How, problems
from overlay.policy.snapshot import Snapshot
from overlay.policy.sources import ALWAYS, Feeds, Sources
from overlay.policy.table import SUFFIX, Maker, table
from overlay.process.dry import dry
from overlay.process.log import log

_NO_LOG = (errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL)
"""What a kernel says that has no NFLOG (and of other things, too)."""
_KINDS = {CLUSTER_WIDE: CLUSTER_KIND, CONTRACTS: GROUP_KIND}
"""By resource that not every API server has: of which kind are the policies that it makes."""
COUNTED_S = 0.2
"""What rules counted is read at most so often."""


class PolicyAsked(NamedTuple):
    """Somebody asks what is known of policies."""

    answer: queue.SimpleQueue[Snapshot]


class _Wants(NamedTuple):
    """network: its number; subnets: those of this node's pods; enforced: whether policies are to be; wide:
    ClusterNetworkPolicies, too; groups: how pods are grouped; networks: of all pods; former: subnets of a family that is
    switched off, which pods of before may have."""

    network: int
    table: Table
    subnets: tuple[Prefix, ...]
    enforced: bool
    wide: bool
    groups: str
    networks: tuple[Prefix, ...]
    ipvs: bool
    former: tuple[Prefix, ...] = ()

    @property
    def custom(self) -> Mapping[str, bool]:
        """By such a resource: whether it is wanted."""
        return {CLUSTER_WIDE: self.enforced and self.wide, CONTRACTS: self.enforced and self.groups != OFF}


class PolicyController(Controller):
    """Before anti-spoofing, which closes the ports of isolated pods."""

    name = "policy"
    harmless = True
    rechecked = False
    reports = (REFUSED, UNREAD)

    def __init__(
        self,
        current: CurrentInputs,
        sets: NetfilterSocket,
        owned: Owned,
        health: Health,
        clock: Callable[[], float],
        feeds: Feeds,
        results: Callable[[], list[CniResult]],
        nodes: Mapping[int, Nodes],
    ) -> None:
        """results: what CNI gave to this node's pods; nodes: by family."""
        self._current, self._sets, self._owned, self._health, self._clock = current, sets, owned, health, clock
        self._results, self._nodes = results, nodes
        self._nodes_seen = 0
        """The version of these that is compiled."""
        settings = current.inputs.settings
        self._node = settings.node_name or "this node"
        self.cluster = Cluster(self._node, not settings.kube)
        self._sources = Sources(feeds, self.cluster, not settings.kube, clock)
        self._maker, self._cadence = Maker(), Cadence(clock)
        self._stale, self._read_whole = True, True
        self._attached = True
        """What CNI gave to pods is to be read."""
        self._wanted: _Wants | None = None
        self._former: tuple[Prefix, ...] = ()
        """Subnets of a family that is switched off, of which pods here have addresses yet."""
        self._made_for: int | None = None
        """The network for which all is enforced, or nothing need be; None: not yet."""
        self.compiled: Compiled = NOTHING
        self._there: Content | None = None
        self._generation = 0
        self._logs = True
        self._commits = self._mended = 0
        self._counts, self._counted_at = Counts(), -COUNTED_S
        self._failed = ""
        """Why the kernel refused the last change."""
        self._known = False
        """Whether all that is to be enforced was read."""
        self._revision = self._in_force = 0
        """Of the policies that came last, and of those in the kernel."""

    @property
    def handles(self) -> Mapping[type, Handler]:
        """What policies are made of, and that somebody touched the table."""
        return {
            Listed: self._on_resource,
            Changed: self._on_resource,
            Down: self._on_down,
            Absent: self._on_absent,
            PodsAttached: self._on_attached,
            PolicyAsked: self._on_asked,
            NftSeen: self._on_nft,
            Overrun: lambda _event: self._doubt(),
        }

    def _on_resource(self, event: Listed | Changed) -> bool:
        if event.resource not in RESOURCES:
            return False
        self._sources.came(event.resource)
        if event.resource == POLICIES:
            self._revision = event.revision
        self._stale |= self.cluster.take(event)
        return True

    def _on_down(self, event: Down) -> bool:
        self._sources.down(event)
        return True

    def _on_absent(self, event: Absent) -> bool:
        self._sources.none(event)
        self._stale |= self.cluster.take(Listed(event.resource, 0, {}))
        return True

    def _on_attached(self, _event: PodsAttached) -> bool:
        self._attached = True
        return True

    def _on_asked(self, event: PolicyAsked) -> bool:
        cluster = self.cluster
        pods = tuple(cluster.index)
        namespaces, policies = dict(cluster.index.namespaces), tuple(cluster.policies)
        event.answer.put(
            Snapshot(
                self._wanted.network if self._wanted is not None else 1,
                self._node,
                self._known,
                self._there is not None,
                pods,
                namespaces,
                policies,
                dict(cluster.refused),
                self._node_addresses(),
            )
        )
        return False

    def _on_nft(self, event: NftSeen) -> bool:
        return self._doubt() if not event.table or event.table.endswith(SUFFIX) else False

    def _doubt(self) -> bool:
        self._read_whole = True
        return True

    def wants(self, inputs: Inputs) -> object:
        """Which table, for which subnets."""
        settings = inputs.settings
        if not settings.knows_policies:
            return None
        number = network_in_force(inputs)
        if inputs.config is None or inputs.own is None or number is None:
            return Waiting("for a lease")
        subnets = tuple(dict.fromkeys((*(end.subnet for end in inputs.own.ends), *inputs.retained)))
        networks = tuple(pool.network for _, pool in sorted(inputs.config.pools.items()))
        ipvs = any(link.name == "kube-ipvs0" for link in inputs.links.values())
        off = [number for number in FAMILIES if number not in inputs.config.pools]
        addresses = [each for number in off for each in inputs.addresses_of(number).values()]
        former = gateways_on(inputs.bridges, inputs.links, addresses)
        return _Wants(
            number, table(number), subnets, settings.network_policy, settings.cluster_network_policy, settings.groups,
            networks, ipvs, former,
        )  # fmt: skip

    def reconcile(self, wants: Any) -> bool:
        """What is known now, compiled and made so. Raises KernelError."""
        before, failed = self._failed, ""
        try:
            self._reconcile(wants)
        except KernelError as error:
            self._read_whole, failed = True, str(error)
            if wants.enforced and self.cluster.any:
                self._current.set(policies_settled=False)
            raise
        finally:
            self._failed = failed
            if failed != before:
                self._say(wants)
        return False

    def _reconcile(self, wants: _Wants) -> None:
        self._sources.begin(wants.custom)
        self.cluster.enforce(wants.wide, wants.groups, wants.networks)
        if self._attached:
            self._attached = False
            self._stale |= self.cluster.results(self._results())
        if wants != self._wanted:
            if self._wanted is None or wants.network != self._wanted.network:
                self._maker, self._there = Maker(wants.network), None
            self._wanted, self._stale, self._read_whole = wants, True, True
        self._say(wants)
        cluster = self.cluster
        self._known = not self._sources.lacks(ALWAYS) and self._custom_known(wants)
        needed = cluster.any and wants.enforced
        if wants.enforced and not self._known:
            self._cannot_know(wants.table, bool(self._sources.unread), pods=False)  # which nobody asked for yet
            return  # what an agent before us enforced stays
        self._sources.pods(needed)
        if not needed:
            self._in_force = self._revision
            self._current.set(policies_settled=wants.enforced and self._sources.settled(pods=False))
            self._off(wants.table)
            self._made_for = wants.network
            self._current.set(policies_known=True)
            return
        if PODS not in cluster.listed:
            self._known = False
            self._cannot_know(wants.table, self._sources.all_unread((PODS,)), pods=True)
            return
        if self._clock() >= self._cadence.at:
            self._read_whole = True
            self._stale |= cluster.results(self._results())  # whatever was missed
        if self._nodes_changed():
            self._stale = cluster.whole = True
        self._nodes_seen = self._nodes_version()
        if self._stale:
            self._stale = False
            if cluster.whole or self.compiled is NOTHING:
                nodes = self._node_addresses()
                self.compiled = compile_node(cluster.index, cluster.policies, self._node, nodes=nodes)
            else:
                self.compiled = with_pods(self.compiled, cluster.index, cluster.changes)
            cluster.taken()
            self._former = tuple(each for each in wants.former if cluster.index.uses(self._node, each))
            self._make_so(wants)
        elif self._read_whole:
            self._make_so(wants)
        self._in_force, self._made_for = self._revision, wants.network
        settled = self._sources.settled(pods=True)
        policed = Policed(self.compiled.isolated, self._former)
        self._current.set(policed=policed, policies_known=True, policies_settled=settled)

    def _custom_known(self, wants: _Wants) -> bool:
        """Whether NetworkPolicies need not wait for ClusterNetworkPolicies and Contracts: these are known, are not wanted,
        or cannot be read, and the kernel has none of them."""
        missing = self._sources.lacks_custom
        if not missing:
            return True
        if not self._sources.all_unread(missing):
            return False
        kinds = tuple(f"{kind}/" for resource, kind in _KINDS.items() if resource in missing)
        if self._there is not None:
            keys = (key for chain in self.compiled.chains.values() for key in chain.policies)
        else:
            keys = (comment for _, comment, _ in self._rules_of_before(wants.table))
        return not any(key.startswith(kinds) for key in keys)

    def _rules_of_before(self, which: Table) -> list[tuple[str, str, int]]:
        """Those that an agent before us left, none where there is no table (or no nftables)."""
        return self._sets.rules_counted(which, beside=True) if self._sets.stands(which) else []

    def _cannot_know(self, which: Table, unread: bool, pods: bool) -> None:
        """What cannot be read keeps nobody waiting, where no agent before us enforced anything; but new pods wait until a
        refusal is believed. pods: they are needed."""
        self._current.set(policies_settled=self._sources.settled(pods))
        if unread and not self._sets.stands(which):
            self._current.set(policies_known=True)

    def _nodes_version(self) -> int:
        return sum(nodes.version for nodes in self._nodes.values())

    def _nodes_changed(self) -> bool:
        """Whether peers did, and it matters to some policy."""
        changed = self._nodes_version() != self._nodes_seen
        return changed and self._means_nodes()

    def _means_nodes(self) -> bool:
        """Whether some policy means nodes' addresses."""
        return self.cluster.groups != OFF or any(policy.has_blocks for policy in self.cluster.written)

    def _node_addresses(self) -> dict[int, tuple[tuple[int, int], ...]]:
        if not self._means_nodes():
            return {}
        return {family: tuple(nodes.addresses()) for family, nodes in self._nodes.items()}

    def _off(self, which: Table) -> None:
        """No policy: no table, and nothing is lifted for it."""
        self.compiled, self._stale = NOTHING, True
        self._current.set(policed=None)
        if self._there is not None or self._read_whole:
            self._read_whole = False
            if self._sets.remove(which.family, which.name):
                log.info("policy.off", table=which.name, policies=len(self.cluster.policies))
        self._there = None

    def _make_so(self, wants: _Wants) -> None:
        began = time.thread_time()
        whole = self._read_whole
        if whole:
            self._cadence.began()
            self._believe(wants)
        try:
            self._commit(wants.table, self._logs, wants.subnets)
        except KernelError as error:
            if not self._logs or error.errno not in _NO_LOG:
                raise
            self._commit(
                wants.table, False, wants.subnets
            )  # refused as well, unless it was NFLOG that the kernel lacks
            log.warning("policy.no_log", reason=str(error), effect="denied packets are counted, and not told")
            self._logs = False
        if whole:
            self._sets.drop_beside(wants.table)
            self._read_whole = False
            self._cadence.spent(time.thread_time() - began)
            self._cadence.ended()

    def _believe(self, wants: _Wants) -> None:
        """The table as it is, and as an agent before us left it."""
        before, self._there = self._there, None
        # in terms of what was written last: by what is to be now, half of it would be unknown, as if somebody had altered it
        expected = before or self._content(wants.subnets, self._generation or 1, self._logs)
        found = self._sets.read_content(wants.table, expected)
        if found is not None:
            generation = generation_of(found, slot_of(wants.network))
            self._generation = (
                generation  # 0: it is to be raised still, or somebody altered the chain: another one then
            )
            if generation:
                found = found._replace(chains={**found.chains, FORWARD: forward(generation, slot_of(wants.network))})
            if before is not None and found != before:
                self._mended += 1
                log.warning("policy.mended", table=wants.table.name, effect="somebody altered the table of policies")
        elif before is not None:
            self._mended += 1
            log.warning("policy.mended", table=wants.table.name, effect="somebody deleted the table of policies")
        self._there = found

    def _content(self, subnets: tuple[Prefix, ...], generation: int, logs: bool) -> Content:
        return self._maker.content(self.compiled, (*subnets, *self._former), generation, logs)

    def _commit(self, which: Table, logs: bool, subnets: tuple[Prefix, ...]) -> None:
        there = self._there
        if there is None or not self._generation:  # marks of a table that was here before say nothing
            self._clear_marks("the table is new")
            self._generation = random.randrange(1, LAST_GENERATION)  # noqa: S311
        wanted = self._content(subnets, self._generation, logs)
        takes = there is not None and takes_away(there, wanted, self.compiled.turned)
        if takes:
            wanted = wanted._replace(chains={**wanted.chains, FORWARD: unmarked()})
        written = self._change(which, there, wanted)
        self._there = wanted
        if takes:  # after the change itself: a packet under way must not be marked with the new one by the old rules
            if self._generation == LAST_GENERATION:
                self._clear_marks("generations begin anew")
            self._generation = self._generation % LAST_GENERATION + 1
            raised = self._content(subnets, self._generation, logs)
            self._change(which, wanted, raised)
            self._there = raised
        if written:
            self._commits += 1
            log.debug("policy", table=which.name, generation=self._generation, chains=len(self.compiled.chains))

    def _clear_marks(self, reason: str) -> None:
        """No connection has been judged."""
        if not dry.run and (cleared := clear_marks(MARK_MASK)):
            log.info("policy.marks_cleared", connections=cleared, reason=reason)

    def _change(self, which: Table, there: Content | None, wanted: Content) -> bool:
        try:
            return self._sets.change_content(which, there, wanted)
        except ValueError as error:  # a set or chain of another form: an agent of another version, or somebody
            log.warning("policy.made_anew", table=which.name, reason=str(error))
            self._sets.replace_content(which, wanted)
            return True

    def _say(self, wants: _Wants) -> None:
        """What stands in the way."""
        how = How(wants.enforced, wants.ipvs, self._there is not None, self._failed)
        for subject, words in problems(self.cluster, self._sources.unread, self._sources.absent, how).items():
            self._health.report(subject, words, harmless=True)

    def due(self) -> float | None:
        """When the table is read again."""
        if self._there is None or not self._known:
            return None
        return 0.0 if self._nodes_changed() else self._cadence.at

    def leave(self, network: int) -> Iterator[str]:
        """No table of a network, once that of the one in its place enforces. Raises KernelError, NotYet."""
        if self._current.inputs.settings.knows_policies and self._made_for in (None, network):
            raise NotYet
        yield from self._remove(network)

    def _remove(self, network: int) -> Iterator[str]:
        which = table(network)
        if self._sets.remove(which.family, which.name):
            yield f"nft table {which.family} {which.name}"

    def withdraw(self) -> Iterator[str]:
        """Delete the tables."""
        for network in self._owned.networks():
            yield from self._remove(network)
        self._made_for = None
        self._there, self._wanted = None, None
        self._stale = self._read_whole = True
        self._current.set(policed=None)
        for subject in (*self.reports, NOT_ENFORCED):
            self._health.solved(subject)

    @property
    def _passed_by(self) -> bool:
        """Whether kube-proxy's IPVS goes past the hook."""
        return self._wanted is not None and self._wanted.ipvs

    def status(self) -> Mapping[str, object]:
        """`policy`: what is enforced; nothing where there is nobody to say so."""
        if not self._current.inputs.settings.knows_policies:
            return {}
        self._count()
        compiled, cluster, policies = self.compiled, self.cluster, self.cluster.policies
        return {
            "policy": {
                "enforced": self._there is not None and not self._failed and not self._passed_by,
                "policies": sum(policy.kind != GROUP_KIND for policy in policies),
                "cluster_wide": sum(policy.kind == CLUSTER_KIND for policy in policies),
                "groups": sum(policy.kind == GROUP_KIND for policy in policies),
                "refused": dict(sorted(cluster.refused.items())),
                "pods": len(cluster.index),
                "isolated_addresses": len(compiled.isolated),
                "generation": self._generation if self._there is not None else 0,
                "revision": self._in_force,
                "decided": self._counts.shown(),
            }
        }

    def counters(self) -> Mapping[str, int]:
        """How often the table was changed, and put back; what it dropped since this agent began."""
        if not self._current.inputs.settings.knows_policies:
            return {}
        self._count()
        return {
            "policy_commits": self._commits,
            "mended_policy": self._mended,
            "dropped_by_policy": self._counts.denied,
            "dropped_of_unknown_pods": self._counts.unknown,
        }

    def _count(self) -> None:
        """What the rules counted, where the kernel says it."""
        now = self._clock()
        if self._there is None or self._wanted is None or now - self._counted_at < COUNTED_S:
            return
        self._counted_at = now
        with suppress(OSError):
            self._counts.take(self._sets.rules_counted(self._wanted.table), self.compiled)
