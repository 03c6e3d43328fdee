"""Who answers for an address on the underlay's link: whether a record's owner lives, whether another host has our own."""

from __future__ import annotations

from collections.abc import Iterable

from lease.families import V4
from lease.model import around
from lease.tenure.claim import Answer
from overlay.kernel.arp import probe
from overlay.kernel.netlink import KernelError, RequestSocket
from overlay.kernel.route.entries import Address
from overlay.node.underlay import ANYWHERE, on_link_interface
from overlay.process.log import log


def who_answers(address: int) -> Answer:
    """Who answers for an address: by ARP on the interface to which it is on-link; cannot tell where it is not.

    Nor where the router answers: in some clouds, and with proxy ARP, it does so for every address of the link, our own
    among them.
    """
    requests = RequestSocket()
    try:
        links, addresses = requests.links(), requests.addresses(V4)
        name = on_link_interface(V4, address, links, addresses)
        if name is None:
            return Answer(False, None)
        by = probe(name, address)
        if by is None or by in {link.mac for link in links}:
            return Answer(True, None)  # nobody, or another interface of ours on that link
        index = next(link.ifindex for link in links if link.name == name)
        way = requests.lookup(V4, ANYWHERE[V4.number], oif=index)
        others = _others_on(index, addresses, address, way.via if way is not None else 0)
        if any(probe(name, other) == by for other in others):
            return Answer(False, None)  # it answers for whatever is asked
        return Answer(True, by)
    except (KernelError, OSError) as error:
        log.warning("probe", error=str(error), effect="it is not known who has that address")
        return Answer(False, None)
    finally:
        requests.close()


def _others_on(index: int, addresses: Iterable[Address], address: int, router: int) -> list[int]:
    """Addresses on an interface's link for which a host that has only `address` does not answer: the router's (0: there is
    none), and the last of the prefix."""
    mine = [item for item in addresses if item.oif == index]
    lasts = [around(item.family, item.address, item.length).last - 1 for item in mine if item.length < V4.bits - 2]
    local = {item.address for item in mine} | {0, address}
    return [other for other in dict.fromkeys((router, *lasts[:1])) if other not in local]
