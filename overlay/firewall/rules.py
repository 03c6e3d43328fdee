"""The controllers of what the nft program writes: our nat and forward table, and our rules in other people's forward chains.

They work in a thread (control/background.py): the program takes seconds where a node has many rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lease.families import Family
from lease.model import Prefix
from overlay.control.background import BackgroundController
from overlay.control.controller import Handler, NotYet, Waiting
from overlay.control.health import Health
from overlay.control.inputs import Inputs
from overlay.firewall import forward, nat
from overlay.kernel.events import ForeignRulesSeen, NftSeen
from overlay.kernel.nftables import program
from overlay.node.owned import Owned
from overlay.node.standing import backend_in_force
from overlay.peers.plan import nodes_within
from overlay.process.log import log

SOON_S, FORWARD_GAP_S, OTHERS_GAP_S = 0.1, 2.0, 10.0
"""kube-proxy writes to the shared table, too: checked a moment later, and so often at most; after changes of others'
tables, which may have forward chains of their own, less often."""


class _RulesController(BackgroundController):
    """One whose rules pods need: a start waits until they were loaded once."""

    def __init__(self, post: Callable[[Any], None], health: Health, owned: Owned) -> None:
        super().__init__(post, health)
        self._owned = owned

    def leave(self, network: int) -> Iterator[str]:
        """No table or rules of a network. Raises KernelError, NotYet."""
        if self.busy:  # it may make again what is taken away now
            raise NotYet
        yield from self._remove(network)

    def withdraw(self) -> Iterator[str]:
        """Take away what is ours."""
        yield from super().withdraw()
        for network in self._owned.networks():
            yield from self._remove(network)

    def _remove(self, network: int) -> Iterator[str]:
        """Take away what is of a network. Raises KernelError."""
        raise NotImplementedError

    def unready(self) -> str:
        """Whether it was done once."""
        return "" if self.completed else f"for the {self.name} rules"


class _NatWants(NamedTuple):
    name: str
    rules: tuple[Any, ...]


class NatController(_RulesController):
    """Our table of masquerade and forward rules, of one family."""

    name = "nat"

    def __init__(self, family: Family, post: Callable[[Any], None], health: Health, owned: Owned) -> None:
        super().__init__(post, health, owned)
        self._family = family
        self._loaded: tuple[program.Objects, program.Objects] | None = None
        """What we loaded last, and how nft listed it then. Belongs to the worker's thread."""
        self._mended = 0

    @property
    def handles(self) -> Mapping[type, Handler]:
        """Somebody touched our table."""
        return {**super().handles, NftSeen: self._on_nft}

    @staticmethod
    def _on_nft(event: NftSeen) -> bool:
        return not event.table or nat.is_table_name(event.table)

    def wants(self, inputs: Inputs) -> object:
        """The table, as nft lists it."""
        number = self._family.number
        pool, end = inputs.pool(number), inputs.end(number)
        backend = backend_in_force(inputs, self._family)
        if backend is None or pool is None or end is None or number not in inputs.tunnels:
            return Waiting("for a lease")
        live = inputs.settings
        name, outer = nat.table_name(backend.network), backend.outer()
        nodes = nodes_within(pool.network, inputs.underlays.get(number), live.underlay_cidrs_of(number))
        table = nat.nat_table(
            name, pool.network, end.subnet, live.ip_masq, live.fully_random, live.forward_rules,
            outer.port if outer is not None else None, nodes,
        )  # fmt: skip
        return _NatWants(name, tuple(table))

    def _work(self, wants: _NatWants) -> tuple[int, str, list[str]]:
        """The table as it should be; 1 when somebody else had altered it. Raises KernelError."""
        name, wanted = wants.name, list(wants.rules)
        found = program.read_table(self._family.nft, name)
        # An nft of another version may list what we loaded in other words: remembered, so as not to load for ever.
        if found == wanted or self._loaded == (wanted, found):
            self._loaded = (wanted, found)
            return 0, name, []
        altered = self._loaded is not None and self._loaded[0] == wanted
        program.load_table(self._family.nft, name, wanted)
        self._loaded = (wanted, program.read_table(self._family.nft, name))
        return int(altered), name, sorted({item["chain"]["name"] for item in wanted if "chain" in item})

    def _done(self, result: tuple[int, str, list[str]]) -> None:
        altered, name, chains = result
        self._mended += altered
        if altered:
            log.warning("nat.mended", table=name, effect="put back as it should be")
        elif chains:
            log.info("nat", table=name, masquerade="postrouting" in chains, forward="forward" in chains)

    def _remove(self, network: int) -> Iterator[str]:
        name = nat.table_name(network)
        if program.read_table(self._family.nft, name):
            program.load_table(self._family.nft, name, [])
            yield f"nft table {self._family.nft} {name}"

    def counters(self) -> Mapping[str, int]:
        """How often it was put back."""
        return {"mended_nat": self._mended}


class _ForwardWants(NamedTuple):
    name: str
    network: Prefix | None


class ForwardController(_RulesController):
    """Our rules in other people's forward chains, of one family, and what of those an operator must mend."""

    name = "forward"
    reports = ("forward chain",)
    harmless = True

    def __init__(
        self, family: Family, post: Callable[[Any], None], health: Health, owned: Owned, clock: Callable[[], float]
    ) -> None:
        super().__init__(post, health, owned)
        self._family, self._clock = family, clock
        self._check_at: float | None = None
        self._checked_at = float("-inf")

    @property
    def handles(self) -> Mapping[type, Handler]:
        """Somebody touched the table that iptables' programs share."""
        return {**super().handles, NftSeen: self._on_nft, ForeignRulesSeen: lambda _event: self._on_others()}

    def _on_others(self) -> bool:
        soon = max(self._clock() + FORWARD_GAP_S, self._checked_at + OTHERS_GAP_S)
        self._check_at = min(self._check_at or soon, soon)
        return False

    def _on_nft(self, event: NftSeen) -> bool:
        if event.table == forward.SHARED_TABLE:
            self._check_at = self._check_at or max(self._clock() + SOON_S, self._checked_at + FORWARD_GAP_S)
        return not event.table

    def due(self) -> float | None:
        """A moment after others wrote."""
        return self._check_at

    def wants(self, inputs: Inputs) -> object:
        """Whose packets are let through; None: nobody's by us."""
        number = self._family.number
        pool, backend = inputs.pool(number), backend_in_force(inputs, self._family)
        if backend is None or pool is None or inputs.own is None or number not in inputs.tunnels:
            return Waiting("for a lease")
        network = pool.network if inputs.settings.forward_rules else None
        return _ForwardWants(nat.table_name(backend.network), network)

    def reconcile(self, wants: Any) -> bool:
        """Begin to check."""
        self._check_at, self._checked_at = None, self._clock()
        return super().reconcile(wants)

    def _work(self, wants: _ForwardWants) -> tuple[list[str], str]:
        return forward.ensure(self._family, wants.name, wants.network)

    def _done(self, result: tuple[list[str], str]) -> None:
        did, blocked = result
        for done in did:
            log.info("forward", action=done)
        self._health.report("forward chain", blocked, harmless=True)

    def _remove(self, network: int) -> Iterator[str]:
        yield from forward.remove(self._family, nat.table_name(network))
