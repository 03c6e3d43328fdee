"""What becomes of a packet that goes elsewhere than it should, and why: asked of the kernel, in the operator's words."""

from __future__ import annotations

import errno
from collections.abc import Mapping

from lease.families import Family
from lease.model import Prefix, ip_text
from overlay.kernel.netlink import RequestSocket
from overlay.kernel.route.links import read_sysctl
from overlay.kernel.route.lookup import Packet, Way
from overlay.reach import explain, ways


class Causes:
    """Of one node, as it is now."""

    def __init__(self, family: Family, requests: RequestSocket, network: Prefix, names: Mapping[int, str]) -> None:
        """names: of interfaces, by number."""
        self._family, self._requests, self._network, self._names = family, requests, network, names

    def happens(self, question: ways.Question, way: Way) -> str:
        """What the packets do."""
        if self._as_spoofed(question, way):
            return explain.refusal_text(way._replace(error=errno.EXDEV))
        if way.error or not way.oif:
            return explain.refusal_text(way)
        if question.what == ways.OUTER and not way.table:
            return "find no route"
        happens = f"leave by {self._names.get(way.oif, way.oif)}"
        if way.via:
            happens += f" via {ip_text(self._family.number, way.via)}"
        expected = self._names.get(question.oif)
        return happens + (f", not by {expected}" if expected else "")

    def _as_spoofed(self, question: ways.Question, way: Way) -> bool:
        """Of a packet for this node itself the kernel says EINVAL where rp_filter drops it."""
        if question.what != ways.INCOMING or way.error != errno.EINVAL:
            return False
        conf, name = f"net/{self._family.sysctl}/conf", self._names.get(question.packet.iif, "?")
        return "1" in (read_sysctl(f"{conf}/all/rp_filter"), read_sysctl(f"{conf}/{name}/rp_filter"))

    def cause(self, question: ways.Question, way: Way) -> str:
        """Why, and what to do about it. Raises KernelError."""
        packet, conf = question.packet, f"net/{self._family.sysctl}/conf"
        if way.error in (errno.EHOSTUNREACH, errno.EXDEV, errno.EINVAL) and packet.iif:
            name = self._names.get(packet.iif, "?")
            if way.error == errno.EXDEV or self._as_spoofed(question, way):
                return f"sysctl -w {conf.replace('/', '.')}.{name}.rp_filter=2 (and see ip rule)"
            if way.error != errno.EINVAL and read_sysctl(f"{conf}/{name}/forwarding") == "0":
                return f"forwarding is off on {name}: sysctl -w {conf.replace('/', '.')}.{name}.forwarding=1"
        if question.what == ways.OUTER and not way.error:
            free = packet._replace(oif=0)
            if self._requests.way(self._family, free).error not in (0, errno.ENETUNREACH):  # asked unbound alone
                return self._decided(free)
            lower = self._names.get(packet.oif, "the underlay")
            address = ip_text(self._family.number, packet.address)
            return f"no route by {lower} leads to {address}, its public IP: ip route get {address} oif {lower}"
        if way.error and packet.iif and packet.source and not explain.refuses(self._decision(packet)):
            onward = self._requests.way(self._family, Packet(packet.address, mark=packet.mark))
            if not onward.error and onward.oif == question.oif:  # it is the way back to its source that is refused
                return self._decided(Packet(packet.source, packet.address, mark=packet.mark))
        return self._decided(packet)

    def _decision(self, packet: Packet) -> explain.Decision:
        rules = self._requests.rules(self._family)
        return explain.decision(
            self._family, rules, lambda table: self._requests.routes_of(self._family, table), self._names, packet
        )

    def _decided(self, packet: Packet) -> str:
        """By which rule and route, and what to do about it."""
        return explain.cause(self._family, self._network, self._decision(packet), self._names)
