"""Forward chains of others that drop by policy (Docker, ufw): an accept in our own table does not override those.

flannel appends its rules to iptables' FORWARD chain, so its pods get through there, and so do ours: in that chain, which
every tool of the iptables family shares, two rules of ours stand while its policy is drop. Any other chain that drops is
named to the operator, and left alone.
"""

from __future__ import annotations

from lease.families import Family
from lease.model import Prefix
from overlay.firewall import nat as masquerade
from overlay.kernel.nftables import iptables
from overlay.kernel.nftables import program as nft

SHARED_TABLE, SHARED_CHAIN = "filter", "FORWARD"
"""iptables' own chain, as its nftables variant has it."""


def tag(table: str) -> str:
    """The comment by which our rules are known. table: our own table's name."""
    return f"{table} forward"


def ensure(family: Family, table: str, network: Prefix | None) -> tuple[list[str], str]:
    """Let forwarded packets of a network through (None: no rules of ours any more). What was done, for the log, and what
    an operator must mend, "" where nothing.

    Raises KernelError.
    """
    did: list[str] = []
    blocked: list[str] = []
    for chain in nft.forward_chains(family.nft):
        drops = chain.policy == "drop"
        if chain[:3] == (family.nft, SHARED_TABLE, SHARED_CHAIN):
            did += _in_nft(chain, tag(table), network if drops else None)
        elif drops and network is not None and not chain.table.startswith(masquerade.TABLE_PREFIX):
            blocked.append(str(chain))
    try:
        did += _in_iptables(family.number, tag(table), network)
    except iptables.NoProgram as missing:
        if network is not None:
            return did, f"the old iptables are in use on this node, and they cannot be read: {missing.strerror}"
    if not blocked:
        return did, ""
    return did, (
        f"chain {', '.join(blocked)} drops what it does not accept, and the pods' traffic goes through it; if it does not"
        f" accept that yet: nft add rule {blocked[0]} {family.nft} saddr {network} accept; the same with daddr"
    )


def _in_nft(chain: nft.Chain, comment: str, network: Prefix | None) -> list[str]:
    there = [rule for rule in nft.rules_of(*chain[:3]) if rule.get("comment") == comment]
    wanted = [] if network is None else masquerade.accepts(network)
    if [rule.get("expr") for rule in there] == wanted:
        return []
    nft.change_rules(chain, there, [{"expr": expr, "comment": comment} for expr in wanted])
    return [_description(str(chain), network)]


def _in_iptables(family: int, comment: str, network: Prefix | None) -> list[str]:
    lines = iptables.forward_chain(family)
    if lines is None:
        return []
    there = [line for line in lines if f'"{comment}"' in line]
    drops = "-P FORWARD DROP" in lines and network is not None
    wanted = [iptables.accept_rule(direction, str(network), comment) for direction in ("-s", "-d")] if drops else []
    if there == wanted:
        return []
    iptables.change_rules(family, there, wanted)
    return [_description("iptables-legacy FORWARD", network if drops else None)]


def _description(chain: str, network: Prefix | None) -> str:
    return f"{chain}: rules taken out" if network is None else f"{chain}, which drops by policy: {network} let through"


def remove(family: Family, table: str) -> list[str]:
    """Take our rules out of other people's chains. Raises KernelError."""
    return ensure(family, table, None)[0]
