"""What holds packets at an interface: its queueing discipline, and the state of its port of a bridge. Read on request.

Sources: include/uapi/linux/{rtnetlink,pkt_sched,if_link,if_bridge}.h.
"""

from __future__ import annotations

import struct

from overlay.kernel.netlink import RequestSocket
from overlay.kernel.route import link_wire, wire

RTM_GETQDISC = 38
_TCMSG = struct.Struct("=BxxxiIII")
_TCA_KIND = 1
_INFO_SLAVE_DATA, _BRPORT_STATE = 5, 1
HARMLESS = frozenset(("noqueue", "mq", "pfifo_fast", "fq", "fq_codel", "pfifo", "ingress"))
"""Those that a kernel or a distribution sets by itself; they drop where a link is full alone."""
STATES = ("disabled", "listening", "learning", "forwarding", "blocking")
FORWARDING = 3


def disciplines(requests: RequestSocket) -> dict[int, list[str]]:
    """The kinds of queueing disciplines, by interface. Raises KernelError."""
    found: dict[int, list[str]] = {}

    def parse(body: memoryview) -> tuple[int, str] | None:
        _, index, _, _, _ = _TCMSG.unpack_from(body)
        kind = wire.attributes(body, _TCMSG.size).get(_TCA_KIND)
        return None if kind is None else (index, bytes(kind).rstrip(b"\0").decode("ascii", "replace"))

    def request(seq: int) -> bytes:
        return wire.message(RTM_GETQDISC, wire.NLM_F_DUMP, seq, _TCMSG.pack(0, 0, 0, 0, 0))

    for index, kind in requests.dump(request, parse):
        found.setdefault(index, []).append(kind)
    return found


def port_state(requests: RequestSocket, name: str) -> int | None:
    """The state of a bridge's port, by STATES; None: it is none. Raises KernelError."""
    body = requests.ask(lambda seq: link_wire.link_by_name(seq, name))
    info = wire.attributes(body, link_wire.IFINFO_SIZE).get(wire.IFLA_LINKINFO)
    slave = wire.attributes(info, 0).get(_INFO_SLAVE_DATA) if info is not None else None
    state = wire.attributes(slave, 0).get(_BRPORT_STATE) if slave is not None else None
    return None if state is None else state[0]
