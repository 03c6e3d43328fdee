"""A tenure on a store in memory, and whoever answers for addresses."""

import random

from lease.config import parse_config
from lease.model import Endpoint, Lease, ip_number, mac_number, prefix
from lease.records.codec import decode_lease, encode_value
from lease.tenure.claim import Answer, Claim, Identity
from lease.tenure.etcd import Tenure
from lease.tenure.events import Held
from tests.support.fake_store import FakeStore

IP2, IP3, IP9 = (ip_number(f"192.168.1.{n}", 4) for n in (2, 3, 9))
MAC_A, MAC_B = mac_number("0a:00:00:00:00:0a"), mac_number("0a:00:00:00:00:0b")
ME = Identity("machine", "n2", "02:00:00:00:00:02")
CLONE = Identity("machine", "n2", "02:00:00:00:00:99")
OTHER = Identity("another", "n3", "02:00:00:00:00:03")
SOMEBODY, NOBODY, UNKNOWN = Answer(True, 0x02FF), Answer(True, None), Answer(False, None)
CONFIG = parse_config('{"Network":"10.244.0.0/16"}')


def lease(subnet="10.244.5.0/24", ip=IP2, mac=MAC_A, node="", backend="vxlan") -> Lease:
    where = prefix(subnet)
    return Lease(subnet.replace("/", "-"), backend, Endpoint(where, ip, 1, mac), None, str(node), 0, 0, 0)


class World:
    """A store, a prober that is asked and counted, a tenure."""

    def __init__(self, answer=NOBODY, config=CONFIG):
        self.store = FakeStore()
        self.config = config
        self.asked: list[int] = []
        self.answers: dict[int, Answer] = {}
        self.answer = answer
        self.now = 0.0
        self.tenure = Tenure(self.store, self.probe, 86_400, random.Random(1), lambda: self.now)

    def probe(self, address):
        self.asked.append(address)
        return self.answers.get(address, self.answer)

    def put(self, it: Lease, left: float | None = 86_000) -> Lease:
        handle = 0
        if left is not None:
            handle = len(self.store.leases) + 100
            self.store.leases[handle] = left
        self.store.put(it.key, encode_value(it), handle)
        return decode_lease(it.key, *self.store.records[it.key])

    def settle(self, device_mac=None, ip=IP2, who=ME, previous=None, take_over=False):
        claim = Claim(self.config, ip, device_mac, who, prefix(previous) if previous else None, take_over)
        return self.tenure.settle(claim)

    def stored(self, key="10.244.5.0-24") -> Lease:
        return decode_lease(key, *self.store.records[key])


def only_held(events) -> Held:
    assert len(events) == 1
    assert isinstance(events[0], Held), events
    return events[0]


def running(**options) -> tuple[World, Lease]:
    world = World(**options)
    return world, only_held(world.settle(previous="10.244.5.0/24")).lease
