"""The nat and forward table, and other people's forward chains: looked at and mended in a thread that lives so long.

nft is a program, and takes seconds where a node has many rules: no peer waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from lease.model import Prefix
from overlay.firewall import antispoof, forward, guard
from overlay.firewall import nat as masquerade
from overlay.kernel.netlink import words_of
from overlay.kernel.nftables import program as nft
from overlay.process.log import log

NAT, FORWARD = "nat", "forward"


def tables(vni: int) -> tuple[tuple[str, str], ...]:
    """Our tables of a network: family and name."""
    return ("ip", masquerade.table_name(vni)), ("ip", guard.table_name(vni)), ("bridge", antispoof.table_name(vni))


class Rules(NamedTuple):
    """What the rules are made of."""

    vni: int
    port: int
    network: Prefix
    subnet: Prefix
    ip_masq: bool
    fully_random: bool
    forward_rules: bool


class Looked(NamedTuple):
    """A look at the rules ended. what: NAT, FORWARD."""

    what: frozenset[str]
    refused: dict[str, str]
    """What could not be mended, and why."""
    blocked: str
    """What an operator must mend of other people's chains, "" where nothing."""
    mended: int
    """Tables of ours that somebody had altered or removed."""


class Firewall:
    """One look at a time."""

    def __init__(self, post: Callable[[Looked], None]) -> None:
        self._post = post
        self._loaded: tuple[nft.Objects, nft.Objects] | None = None
        """What we loaded last, and how nft listed it then. Belongs to the thread that looks."""
        self._under_way: frozenset[str] = frozenset()
        self.looked: set[str] = set()
        """What was looked at, since the start."""

    @property
    def busy(self) -> bool:
        """Whether a look is under way."""
        return bool(self._under_way)

    def look(self, rules: Rules, what: frozenset[str]) -> None:
        """Begin one; a Looked is posted when it ends, and `took` is to be called with that."""
        assert not self.busy
        self._under_way = what
        try:
            threading.Thread(target=self._run, args=(rules, what), name="firewall", daemon=True).start()
        except RuntimeError as error:  # at the limit of what the container may have
            self._post(Looked(what, dict.fromkeys(what, words_of(error)), "", 0))

    def took(self, looked: Looked) -> None:
        """It ended."""
        self._under_way = frozenset()
        self.looked |= looked.what

    def _run(self, rules: Rules, what: frozenset[str]) -> None:
        refused: dict[str, str] = {}
        blocked, mended = "", 0
        name = masquerade.table_name(rules.vni)
        if NAT in what:
            try:
                mended = self._ensure_table(name, rules)
            except Exception as error:  # a thread that ends without a word would never be asked again
                refused[NAT] = words_of(error)
        if FORWARD in what:
            try:
                did, blocked = forward.ensure(name, rules.network if rules.forward_rules else None)
                for done in did:
                    log.info("forward", did=done)
            except Exception as error:  # a thread that ends without a word would never be asked again
                refused[FORWARD] = words_of(error)
        self._post(Looked(what, refused, blocked, mended))

    def _ensure_table(self, name: str, rules: Rules) -> int:
        """The table as it should be; 1 when somebody else had altered it. Raises KernelError."""
        _, port, network, subnet, ip_masq, fully_random, forward_rules = rules
        wanted = masquerade.nat_table(name, network, subnet, ip_masq, fully_random, forward_rules, port)
        found = nft.read_table("ip", name)
        # An nft of another version may list what we loaded in other words: remembered, so as not to load for ever.
        if found == wanted or self._loaded == (wanted, found):
            self._loaded = (wanted, found)
            return 0
        altered = self._loaded is not None and self._loaded[0] == wanted
        if altered:
            log.warning("nat.mended", table=name, effect="put back as it should be")
        nft.load_table("ip", name, wanted)
        self._loaded = (wanted, nft.read_table("ip", name))
        log.info("nat", table=name, masquerade=ip_masq, forward=forward_rules)
        return int(altered)
