"""The controller of WireGuard's peers, beside a device that counts what it is told."""

from __future__ import annotations

import pytest

from lease.backend_config import WireguardConfig
from lease.config import parse_config
from lease.families import V4, V6
from lease.model import Endpoint, Lease, Prefix
from lease.records.packed import pack
from overlay.control.controller import Waiting
from overlay.control.health import Health
from overlay.control.inputs import CurrentInputs, Tunnel
from overlay.kernel.netlink import KernelError
from overlay.kernel.wireguard.device import NO_KEY, WgDevice
from overlay.settings.settings import Settings
from overlay.wireguard import controller as controllers
from overlay.wireguard.controller import WireguardController
from overlay.wireguard.keys import KeyHolder
from overlay.wireguard.peers import Keyed
from tests.support.clock import Clock

CONFIG = parse_config('{"Network":"10.0.0.0/8","Backend":{"Type":"wireguard"}}')
PRIVATE, PUBLIC = b"p" * 32, b"q" * 32


class Fake:
    """A device: what it holds, and how it was told so."""

    def __init__(self) -> None:
        self.now = WgDevice(NO_KEY, 0, {})
        self.puts: list[dict] = []
        self.owners: dict = {}
        self.reads = self.sets = 0
        self.refusing = ""

    def read(self) -> WgDevice:
        self.reads += 1
        if self.refusing == "read":
            raise KernelError(5, "refused")
        return self.now

    def set(self, key: bytes, port: int) -> None:
        self.sets += 1
        self.now = self.now._replace(private_key=key, port=port)

    def put(self, peers) -> None:
        if self.refusing == "put":
            raise KernelError(5, "refused")
        self.puts.append(dict(peers))
        there = self.now.peers
        assert isinstance(there, dict)
        for key, peer in peers.items():
            if peer is None:
                there.pop(key, None)
                continue
            for net in peer.allowed:  # a later one takes a prefix from whoever had it, without a word
                other = self.owners.get(net)
                if other in there and other != key:
                    there[other] = there[other]._replace(allowed=there[other].allowed - {net})
                self.owners[net] = key
            there[key] = peer if peer.place is not None else peer._replace(place=there[key].place)

    def close(self) -> None:
        pass


def lease(number: int, key: int | None = None) -> Lease:
    subnet = Prefix(4, (10 << 24) + (number << 8), 24)
    public = (key if key is not None else number).to_bytes(4, "big") + b"k" * 28
    end = Endpoint(subnet, (192 << 24) + number, None, None, 0, public, 51820)
    return Lease.of(f"{number}", "wireguard", [end], "", number)


class Setting:
    def __init__(self, leases=()) -> None:
        self.clock, self.device, self.table = Clock(), Fake(), Keyed(V4)
        self.table.load([pack(each) for each in leases])
        holder = KeyHolder()
        holder.private = PRIVATE
        self.current = CurrentInputs(Settings())
        self.current.set(config=CONFIG, public_key=PUBLIC, published_key=PUBLIC)
        self.current.set_family("tunnels", 4, Tunnel("flannel-wg", 7, 1420))
        self.it = WireguardController(
            self.current, Health(self.clock), holder, [self.table], lambda _name: self.device, self.clock
        )

    def run(self) -> int:
        """All that is to do; in how many slices."""
        wants = self.it.wants(self.current.inputs)
        slices = 1
        while self.it.reconcile(wants):
            slices += 1
        return slices


def test_twenty_thousand_peers_come_by_slices_and_one_change_is_one_peer():
    setting = Setting([lease(number) for number in range(1, 20_001)])
    assert setting.run() >= 20_000 // controllers.SLICE
    assert len(setting.device.now.peers) == 20_000
    assert max(map(len, setting.device.puts)) <= controllers.SLICE
    assert setting.it.unready() == ""
    told, reads = len(setting.device.puts), setting.device.reads
    setting.table.peer_changed(lease(5), lease(5, key=70_005))
    assert setting.it.due() == 0.0
    setting.run()
    (one,) = setting.device.puts[told:]
    assert list(one) == [(70_005).to_bytes(4, "big") + b"k" * 28]
    assert setting.device.reads == reads, "the device is not read for it"
    setting.clock.now += controllers.LINGER_S
    setting.run()
    assert list(setting.device.puts[-1].items()) == [((5).to_bytes(4, "big") + b"k" * 28, None)], (
        "then the old one goes"
    )
    assert len(setting.device.now.peers) == 20_000


def test_a_restart_tells_the_device_nothing():
    setting = Setting([lease(number) for number in range(1, 50)])
    setting.run()
    again = Setting([lease(number) for number in range(1, 50)])
    again.device = setting.device
    told = len(setting.device.puts), setting.device.sets
    again.run()
    assert (len(setting.device.puts), setting.device.sets) == told


def test_what_is_on_the_device_and_nobodys_goes():
    setting = Setting([lease(1)])
    setting.device.now = setting.device.now._replace(peers={b"x" * 32: lease_peer(setting, lease(9))})
    setting.run()
    assert list(setting.device.now.peers) == [lease(1).first.key]


def lease_peer(setting: Setting, of: Lease):
    other = Setting([of])
    other.run()
    return next(iter(other.device.now.peers.values()))


@pytest.mark.parametrize("what", ["read", "put"])
def test_after_a_refusal_all_is_read_again(what):
    setting = Setting([lease(1), lease(2)])
    setting.device.refusing = what
    for _ in range(2):
        with pytest.raises(KernelError):
            setting.run()
        assert setting.it.unready()
    setting.device.refusing = ""
    setting.run()
    assert len(setting.device.now.peers) == 2
    assert setting.it.unready() == ""


def test_a_change_whose_put_was_refused_is_not_lost():
    setting = Setting([lease(1)])
    setting.run()
    setting.device.refusing = "put"
    setting.table.peer_changed(None, lease(2))
    with pytest.raises(KernelError):
        setting.run()
    setting.device.refusing = ""
    setting.run()
    assert len(setting.device.now.peers) == 2


def test_a_device_that_was_made_again_gets_all():
    setting = Setting([lease(1), lease(2)])
    setting.run()
    setting.device = Fake()
    setting.current.set_family("tunnels", 4, Tunnel("flannel-wg", 8, 1420, makes=1))
    setting.run()
    assert len(setting.device.now.peers) == 2
    assert setting.device.now.private_key == PRIVATE


def test_it_waits_for_key_and_device():
    setting = Setting()
    setting.current.set(public_key=b"")
    assert setting.it.wants(setting.current.inputs) == Waiting("for a key")
    setting.current.set(public_key=PUBLIC, tunnels={})
    assert setting.it.wants(setting.current.inputs) == Waiting("for the tunnel device")
    assert isinstance(CONFIG.backend, WireguardConfig)
    setting.current.set(config=parse_config('{"Network":"10.0.0.0/8"}'))
    assert setting.it.wants(setting.current.inputs) is None


def test_an_endpoint_whose_put_was_refused_is_put_again():
    """What was sent last counts, not where the peer was heard since: it must not count before the kernel took it."""
    setting = Setting([lease(1)])
    setting.run()
    moved = lease(1)
    assert moved.v4 is not None
    moved = moved._replace(v4=moved.v4._replace(public_ip=(192 << 24) + 77))
    setting.device.refusing = "put"
    setting.table.peer_changed(lease(1), moved)
    with pytest.raises(KernelError):
        setting.run()
    setting.device.refusing = ""
    setting.run()
    (peer,) = setting.device.now.peers.values()
    assert peer.place is not None
    assert peer.place.address == (192 << 24) + 77


def test_a_peer_that_takes_its_prefix_back_at_once_has_it():
    """While the one that had it lingers, the kernel took it from him already."""
    setting = Setting([lease(1)])
    setting.run()
    setting.table.peer_changed(lease(1), lease(1, key=70_001))
    setting.run()
    setting.table.peer_changed(lease(1, key=70_001), lease(1))
    setting.run()
    setting.clock.now += controllers.LINGER_S
    setting.run()
    (key,) = setting.device.now.peers
    assert key == lease(1).first.key
    assert Prefix(4, (10 << 24) + (1 << 8), 24) in setting.device.now.peers[key].allowed


def test_one_familys_device_that_is_refused_keeps_not_the_others():
    """Mode separate: two devices, and a port of one is another program's."""
    setting = Setting([lease(1)])
    devices = {"flannel-wg": Fake(), "flannel-wg-v6": Fake()}
    devices["flannel-wg"].refusing = "read"
    config = parse_config(
        '{"Network":"10.0.0.0/8","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"wireguard","Mode":"separate"}}'
    )
    setting.current.set(config=config)
    setting.current.set_family("tunnels", 6, Tunnel("flannel-wg-v6", 8, 1400))
    setting.it = WireguardController(
        setting.current, Health(setting.clock), setting.it._holder, [setting.table, Keyed(V6)], devices.__getitem__,
        setting.clock,
    )  # fmt: skip
    with pytest.raises(KernelError):
        setting.run()
    assert devices["flannel-wg-v6"].now.private_key == PRIVATE
    devices["flannel-wg"].refusing = ""
    setting.run()
    assert len(devices["flannel-wg"].now.peers) == 1
