"""WireGuard: messages beside pyroute2's, the userspace protocol, keys, and which peers a device is to have."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.generic.wireguard import wgmsg

from lease.config import parse_config
from lease.families import V4, V6
from lease.model import Endpoint, Lease, Prefix, ip_number, key_bytes, key_text, prefix
from lease.records.packed import pack
from overlay.control.controller import CannotReconcile
from overlay.kernel.wireguard import genl, userspace
from overlay.kernel.wireguard.device import NO_KEY, Place, WgDevice, WgPeer
from overlay.wireguard import keys
from overlay.wireguard.peers import Keyed, Of, differing, wanted

KEYS = [bytes([number] * 32) for number in range(1, 9)]
PEER = WgPeer(
    frozenset({prefix("10.244.2.0/24"), prefix("fd00:10:244:2::/64")}),
    Place(4, ip_number("192.168.1.3", 4), 51820),
    KEYS[7],
    25,
)
PEER6 = WgPeer(frozenset({prefix("10.244.3.0/24")}), Place(6, ip_number("fd00::9", 6), 51821))


def test_a_message_is_as_pyroute2_reads_it():
    data = genl.set_peers(27, 9, "flannel-wg", [(KEYS[0], PEER), (KEYS[1], PEER6), (KEYS[2], None)])
    message = wgmsg(data)
    message.decode()
    assert (message["header"]["type"], message["header"]["sequence_number"], message["cmd"]) == (27, 9, 1)
    assert message.get_attr("WGDEVICE_A_IFNAME") == "flannel-wg"
    first, second, third = message.get_attr("WGDEVICE_A_PEERS")
    assert key_bytes(first.get_attr("WGPEER_A_PUBLIC_KEY").decode()) == KEYS[0]
    assert first.get_attr("WGPEER_A_FLAGS") == 2, "allowed prefixes are replaced"
    assert first.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL") == 25
    endpoint = first.get_attr("WGPEER_A_ENDPOINT")
    assert (endpoint["addr"], endpoint["port"]) == ("192.168.1.3", 51820)
    assert {allowed["addr"] for allowed in first.get_attr("WGPEER_A_ALLOWEDIPS")} == {
        "10.244.2.0/24",
        "fd00:10:244:2::/64",
    }
    assert (second.get_attr("WGPEER_A_ENDPOINT")["addr"], second.get_attr("WGPEER_A_ENDPOINT")["port"]) == (
        "fd00::9",
        51821,
    )
    assert third.get_attr("WGPEER_A_FLAGS") == 1, "taken away"


def test_a_device_whose_peer_goes_on_in_the_next_message_is_one():
    """The kernel's dump has the form of what is set."""
    parts = [PEER._replace(allowed=frozenset({each})) for each in sorted(PEER.allowed)]
    bodies = [memoryview(genl.set_peers(27, 1, "flannel-wg", [(KEYS[0], part)]))[16:] for part in parts]
    head = memoryview(genl.set_device(27, 1, "flannel-wg", KEYS[5], 51820))[16:]
    assert genl.parse_device([head, *bodies]) == WgDevice(KEYS[5], 51820, {KEYS[0]: PEER})


addresses = {4: st.integers(0, (1 << 32) - 1), 6: st.integers(0, (1 << 128) - 1)}
places = st.sampled_from((4, 6)).flatmap(lambda f: st.builds(Place, st.just(f), addresses[f], st.integers(1, 65535)))
nets = st.sampled_from((4, 6)).flatmap(
    lambda f: st.tuples(st.just(f), addresses[f], st.integers(0, 32 if f == 4 else 128))
)
peers = st.builds(
    WgPeer, st.frozensets(nets, max_size=5), places, st.binary(min_size=32, max_size=32), st.integers(0, 65535)
)


@given(peers, st.binary(min_size=32, max_size=32))
def test_both_forms_say_the_same(peer, key):
    told = userspace.parse(f"private_key={KEYS[3].hex()}\nlisten_port=7\n{userspace.lines(key, peer)}errno=0\n\n")
    body = memoryview(genl.set_peers(27, 1, "x", [(key, peer)]))[16:]
    assert told == WgDevice(KEYS[3], 7, {key: peer._replace(adds=False)})
    assert genl.parse_device([body]).peers == {key: peer._replace(adds=False)}


def test_what_a_program_says_beside_that_is_passed_over():
    text = f"private_key={KEYS[0].hex()}\nlisten_port=51820\nfwmark=0\npublic_key={KEYS[1].hex()}\nprotocol_version=1\n"
    text += "last_handshake_time_sec=0\nendpoint=[fe80::1%eth0]:7\ntx_bytes=3\nallowed_ip=10.0.0.0/8\nerrno=0\n\n"
    found = userspace.parse(text).peers[KEYS[1]]
    assert found == WgPeer(frozenset({prefix("10.0.0.0/8")}), Place(6, ip_number("fe80::1", 6), 7))


def test_secrets_are_in_no_text():
    assert KEYS[7].hex() not in repr(PEER) + str(PEER)
    assert repr(KEYS[7]) not in repr(PEER)
    assert repr(KEYS[0]) not in repr(WgDevice(KEYS[0], 1, {}))


# --- keys (RFC 7748, 6.1)


def test_a_public_key_is_the_private_ones():
    """RFC 7748, 6.1: Alice's."""
    private = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    assert keys.public_of(private).hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"


def test_a_key_file_is_made_read_and_refused(tmp_path):
    path = str(tmp_path / "wgkey")
    assert keys.read_key(path) is None
    made = keys.new_key()
    assert (made[0] & 7, made[31] & 0xC0) == (0, 0x40), "clamped (RFC 7748, 5)"
    keys.write_key(path, made)
    assert keys.read_key(path) == made
    assert ((tmp_path / "wgkey").stat().st_mode & 0o777, (tmp_path / "wgkey").stat().st_size) == (0o400, 44)
    for content in ("", "short", key_text(NO_KEY), key_text(made)[:-1]):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(CannotReconcile, match="remove it") as refused:
            keys.read_key(str(tmp_path / "bad"))
        assert not content or content not in str(refused.value), "it may be a secret"


# --- which peers


def end(subnet: str, public_ip: str, key: bytes, port: int = 51820) -> Endpoint:
    there = prefix(subnet)
    return Endpoint(there, ip_number(public_ip, there.family), None, None, 0, key, port)


def lease(*ends: Endpoint) -> Lease:
    return Lease.of(str(ends[0].subnet).replace("/", "-"), "wireguard", ends, "", 1)


def tables(*leases: Lease) -> list[Keyed]:
    made = [Keyed(V4), Keyed(V6)]
    for table in made:
        table.load([pack(each) for each in leases if each.endpoint(table.family) is not None])
    return made


BOTH = lease(end("10.244.2.0/24", "192.168.1.3", KEYS[0]), end("fd00:10:244:2::/64", "fd00::3", KEYS[0], 51821))


def allowed(*texts: str) -> frozenset[Prefix]:
    return frozenset(map(prefix, texts))


@pytest.mark.parametrize(
    ("mode", "families", "able", "place", "subnets"),
    [
        ("separate", (4,), (4, 6), Place(4, ip_number("192.168.1.3", 4), 51820), ("10.244.2.0/24", "192.168.1.3/32")),
        ("separate", (6,), (4, 6), Place(6, ip_number("fd00::3", 6), 51821), ("fd00:10:244:2::/64", "fd00::3/128")),
        ("auto", (4, 6), (4, 6), Place(4, ip_number("192.168.1.3", 4), 51820), None),
        ("auto", (4, 6), (6,), Place(6, ip_number("fd00::3", 6), 51821), None),
        ("ipv6", (4, 6), (4, 6), Place(6, ip_number("fd00::3", 6), 51821), None),
        ("ipv4", (4, 6), (4, 6), Place(4, ip_number("192.168.1.3", 4), 51820), None),
    ],
)
def test_which_underlay_carries_what(mode, families, able, place, subnets):
    of = [table for table in tables(BOTH) if table.family in families]
    found = wanted(Of(mode, families, able), of, KEYS[0])
    assert found is not None
    assert found.place == place
    every = ("10.244.2.0/24", "192.168.1.3/32", "fd00:10:244:2::/64", "fd00::3/128")
    assert found.allowed == allowed(*(subnets or every))


def test_no_way_to_it_no_peer():
    assert wanted(Of("ipv6", (4, 6), (4,)), tables(BOTH), KEYS[0]) is None
    assert wanted(Of("auto", (4, 6), (4,)), tables(BOTH), KEYS[1]) is None


def test_two_nodes_behind_one_address_are_told_apart_by_port_and_share_no_prefix():
    one, two = end("10.244.2.0/24", "198.51.100.1", KEYS[0]), end("10.244.3.0/24", "198.51.100.1", KEYS[1], 51999)
    made = Keyed(V4)
    made.load([pack(lease(one))])
    assert wanted(Of("separate", (4,), (4,)), [made], KEYS[0]).allowed == allowed("10.244.2.0/24", "198.51.100.1/32")
    made.peer_changed(None, lease(two))
    assert made.stale == {KEYS[0], KEYS[1]}, "what the first may send is less now"
    found = {key: wanted(Of("separate", (4,), (4,)), [made], key) for key in KEYS[:2]}
    assert not found[KEYS[0]].allowed & found[KEYS[1]].allowed
    made.stale.clear()
    made.peer_changed(lease(two), None)
    assert made.stale == {KEYS[0], KEYS[1]}
    assert wanted(Of("separate", (4,), (4,)), [made], KEYS[0]).allowed == allowed("10.244.2.0/24", "198.51.100.1/32")
    assert wanted(Of("separate", (4,), (4,)), [made], KEYS[1]) is None


keyed_ends = st.builds(
    lambda subnet, node, key: end(f"10.244.{subnet}.0/24", f"192.168.1.{node}", KEYS[key], 51820),
    st.integers(1, 6), st.integers(2, 5), st.integers(0, 3),
)  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 6), st.none() | keyed_ends), max_size=20))
def test_changes_end_in_what_a_load_gives(changes):
    """By whatever way: each subnet has one record at a time."""
    made, now = Keyed(V4), dict[int, Lease]()
    made.load([])
    for place, one in changes:
        after = None if one is None else lease(one._replace(subnet=prefix(f"10.244.{place}.0/24")))
        made.peer_changed(now.get(place), after)
        if after is None:
            now.pop(place, None)
        else:
            now[place] = after
    anew = Keyed(V4)
    anew.load([pack(each) for each in now.values()])
    of = Of("separate", (4,), (4,))
    assert set(made.keys) == set(anew.keys)
    for key in KEYS[:4]:
        assert (found := wanted(of, [made], key)) == wanted(of, [anew], key) or (
            found is not None and {each.public_ip for _, each in made.ends(key)} != {found.place.address}
        )


def test_a_peer_that_roamed_is_as_it_should_be():
    elsewhere = PEER._replace(place=Place(4, 1, 1))
    assert differing(PEER, PEER, None) is False
    assert differing(elsewhere, PEER, PEER.place) is False, "we gave it its place, and it was heard elsewhere since"
    assert differing(elsewhere, PEER, None) == PEER._replace(adds=True), "who gave it that place is not known"
    more = PEER._replace(allowed=PEER.allowed | {prefix("10.244.77.0/24")})
    added, replaced = differing(PEER, more, PEER.place), differing(more, PEER, PEER.place)
    assert isinstance(added, WgPeer)
    assert isinstance(replaced, WgPeer)
    assert (added.adds, replaced.adds) == (True, False), (
        "prefixes are all taken away for a moment only where one must go"
    )
    assert differing(elsewhere, PEER6, PEER.place) == PEER6, "its record says another one"
    assert differing(PEER._replace(keepalive_s=0), PEER, PEER.place) == PEER._replace(place=None, adds=True)
    assert differing(None, PEER, PEER.place) == PEER
    assert differing(PEER, None, PEER.place) is None
    assert differing(None, None, None) is False


def test_a_peer_of_any_number_of_prefixes_and_any_number_of_peers_fit():
    """A nested attribute has 16 bits for its length: a record must not end the agent by it."""
    many = PEER._replace(allowed=frozenset((4, number << 8, 24) for number in range(2500)))
    peers = {KEYS[0]: many, **{bytes([9, number]) * 16: PEER for number in range(200)}, KEYS[2]: None}
    messages = [genl._set_encoded(27, 1, "flannel-wg", parts) for parts in genl.batches(peers.items())]
    assert max(map(len, messages)) < 1 << 16
    found = genl.parse_device(memoryview(message)[16:] for message in messages).peers
    assert found == {**peers, KEYS[2]: WgPeer(frozenset(), None)}
    flags = []
    for message in messages:
        decoded = wgmsg(message)
        decoded.decode()
        flags += [p.get_attr("WGPEER_A_FLAGS") for p in decoded.get_attr("WGDEVICE_A_PEERS")]
    assert flags.count(2) == 201, "what follows of a peer is added"


def test_of_two_records_of_one_key_no_subnet_goes_to_the_other_ones_node():
    """Each family settles by itself who has a key."""
    one = lease(end("10.244.2.0/24", "192.168.1.3", KEYS[0]))
    two = lease(end("fd00:10:244:9::/64", "fd00::9", KEYS[0], 51821))
    found = wanted(Of("auto", (4, 6), (4, 6)), tables(one, two), KEYS[0])
    assert found is not None
    assert found.allowed == allowed("10.244.2.0/24", "192.168.1.3/32")


@pytest.mark.parametrize(("mode", "mtu"), [("auto", 1320), ("separate", 1420)])
def test_a_device_of_both_families_has_the_smaller_mtu_of_their_underlays(bench, mode, mtu):
    """Else each family's controller would set it to its own in turn."""
    backend = {"Type": "wireguard", "Mode": mode}
    config = parse_config(json.dumps({"Network": "10.244.0.0/16", "Backend": backend}))
    own = bench.current.inputs.own
    end = own.first._replace(mac=None, vni=None, key=b"k" * 32, port=51820)
    under = bench.current.inputs.underlays[4]
    bench.current.set(
        config=config,
        own=Lease.of(own.key, "wireguard", [end], own.node),
        underlays={4: under, 6: under._replace(mtu=1400)},
    )
    assert bench.device().wants(bench.current.inputs).device.mtu == mtu


SLOW = """#!{python}
import socket, sys, time
made = socket.socket(socket.AF_UNIX)
made.bind("/var/run/wireguard/" + sys.argv[2] + ".sock")
time.sleep(0.5)
made.listen(1)
time.sleep(30)
"""


def test_a_program_that_made_its_socket_and_does_not_listen_yet_is_waited_for(tmp_path):
    """Who asks then is refused, as by one that is dead, whose device is deleted."""
    program, folder = tmp_path / "wireguard-go", tmp_path / "sockets"
    program.write_text(SLOW.format(python=sys.executable))
    program.chmod(0o755)
    start = f"from overlay.kernel.wireguard import userspace; print(userspace.start('slow', {str(folder)!r}))"
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", start], env=environ, capture_output=True, text=True, check=True)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.connect(str(folder / "slow.sock"))
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)
