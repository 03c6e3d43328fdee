"""What a node does with a lease that it holds: renewed, put right, lost, taken again."""

import random

import pytest

from lease.config import parse_config
from lease.model import Prefix, ip_number, ip_text
from lease.records.codec import encode_value
from lease.store import LeaseExpired, StoreUnavailable
from lease.tenure.allocate import MACS_S, MOST_MACS
from lease.tenure.claim import Claim, Identity, Occupied
from lease.tenure.etcd import Tenure
from lease.tenure.events import Denied, Disputed, Held, Lost
from tests.support.tenure import (
    CONFIG,
    IP2,
    IP3,
    IP9,
    MAC_A,
    MAC_B,
    ME,
    NOBODY,
    OTHER,
    SOMEBODY,
    UNKNOWN,
    World,
    lease,
    only_held,
    running,
)


def test_nothing_is_written_while_nothing_changes():
    world, held = running()
    revision = world.store.revision
    assert world.settle() == []
    assert world.store.revision == revision
    assert world.stored() == held


def test_a_deleted_record_is_taken_again():
    world, held = running()
    world.store.delete(held.key)
    again = only_held(world.settle())
    assert again.warn
    assert again.lease.same_claim(held)
    assert world.stored().same_claim(held)


@pytest.mark.parametrize("left", [None, 500])
def test_our_record_put_again_under_another_etcd_lease_or_none_is_put_back_under_ours(left):
    world, held = running()
    assert held.handle
    assert world.put(held, left).handle != held.handle
    again = only_held(world.settle())
    assert again.warn
    assert again.lease.same_claim(held)
    assert world.stored().handle == held.handle
    assert world.settle() == []


def test_a_subnet_given_to_another_is_lost_and_another_taken():
    world, held = running()
    world.store.delete(held.key)
    theirs = world.put(lease(ip=IP9, mac=MAC_B, node=OTHER))
    lost, new = world.settle()
    assert isinstance(lost, Lost)
    assert lost.lease.key == held.key
    assert "n3" in lost.reason
    assert isinstance(new, Held)
    assert new.lease.key != held.key
    assert world.stored() == theirs


def test_a_record_overwritten_in_place_by_another_node_is_written_again():
    """A subnet moves by deletion and a transaction that creates; a live lease is not robbed by a put (flannel's renewal)."""
    world, held = running()
    world.put(lease(ip=IP9, mac=MAC_B, node=OTHER))
    [again] = world.settle()
    assert isinstance(again, Held)
    assert again.warn
    assert "had overwritten it" in again.method
    assert world.stored().same_claim(held)
    assert world.settle() == []


@pytest.mark.parametrize("answer", [NOBODY, SOMEBODY, UNKNOWN], ids=["nobody", "another machine", "cannot be asked"])
def test_a_record_with_our_own_address_and_another_mac_counts_where_another_machine_may_have_it(answer):
    world, held = running()
    world.answer = answer
    world.put(lease(ip=IP2, mac=MAC_B, node=OTHER))
    first = world.settle()[0]
    assert isinstance(first, Held if answer is NOBODY else Lost), first
    assert world.stored().same_claim(held) == (answer is NOBODY)


def test_a_node_whose_old_address_another_machine_has_now_does_not_fight_it():
    """It slept; meanwhile its address was given to a new machine, which took the record over; it wakes with another."""
    world, held = running()
    world.put(lease(ip=IP2, mac=MAC_B, node=OTHER))
    world.answers[IP2] = SOMEBODY
    lost, new = world.settle(ip=IP9)
    assert isinstance(lost, Lost)
    assert isinstance(new, Held)
    assert new.lease.key != held.key
    assert world.stored().node == str(OTHER)


def test_a_copy_that_no_machine_answers_for_is_written_over_however_often():
    """Somebody who may write, and writes our MAC and identity."""
    world, held = running()
    for _ in range(30):
        world.put(held._replace(v4=held.v4._replace(public_ip=IP9)))
        [again] = world.settle(device_mac=held.v4.mac)
        assert isinstance(again, Held)
        assert world.stored().same_claim(held)


def test_of_two_copies_of_one_machine_that_write_over_each_other_one_gives_up():
    """Both started from one snapshot of a running node: device, machine-id and interface are the same."""
    world, held = running()
    now = [0.0]
    copy = Tenure(world.store, lambda _address: UNKNOWN, 86_400, random.Random(2), lambda: now[0])
    world.tenure._clock = lambda: now[0]
    world.answer = SOMEBODY
    theirs = Claim(world.config, IP9, held.v4.mac, ME, None)
    lost: list[Lost] = []
    for _ in range(30):
        now[0] += 1
        lost += [event for event in copy.settle(theirs) if isinstance(event, Lost)]
        lost += [event for event in world.settle(device_mac=held.v4.mac) if isinstance(event, Lost)]
        if lost:
            break
    assert len(lost) == 1
    assert "copy of the other's machine" in lost[0].reason
    mine, other = world.tenure.held, copy.held
    assert mine.v4.subnet != other.v4.subnet
    assert mine.v4.mac != other.v4.mac
    for _ in range(5):
        now[0] += 1
        assert copy.settle(theirs) == []
        assert world.settle(device_mac=held.v4.mac) == []
    assert held.key in (mine.key, other.key)


def test_a_subnet_is_not_given_up_to_one_who_writes_over_it_without_end():
    world, held = running()
    for _ in range(30):
        world.put(lease(ip=IP9, mac=MAC_B, node=OTHER))
        again, *told = world.settle()
        assert isinstance(again, Held)
        assert world.stored().same_claim(held)
    assert "check who may write there" in told[0].reason


def test_a_record_that_follows_our_mac_is_left_with_it_after_a_few():
    """It is older: agents that start go by that, and those that run saw us with it first."""
    world = World()
    world.put(lease("10.244.9.0/24", ip=IP9, mac=MAC_B, node=OTHER))
    held = only_held(world.settle(previous="10.244.5.0/24")).lease
    macs, told = {held.first.mac}, []
    for _ in range(10):
        ours = world.stored().first.mac
        world.put(lease("10.244.9.0/24", ip=IP9, mac=ours, node=OTHER))
        told = [each for each in world.settle() if isinstance(each, Disputed)]
        macs.add(world.stored().first.mac)
    assert len(macs) == 1 + MOST_MACS
    assert world.stored().first.mac == ours
    assert "10.244.9.0-24 has our MAC" in told[0].reason
    world.now += MACS_S
    (again,) = world.settle()
    assert world.stored().first.mac not in macs
    assert "with another MAC" in again.method


def test_macs_that_could_not_be_written_are_not_counted(monkeypatch):
    world = World()
    world.put(lease("10.244.9.0/24", ip=IP9, mac=MAC_B, node=OTHER))
    held = only_held(world.settle(previous="10.244.5.0/24")).lease
    world.put(lease("10.244.9.0/24", ip=IP9, mac=held.first.mac, node=OTHER))

    def away(*_):
        raise StoreUnavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(world.store, "change", away)
        for _ in range(2 * MOST_MACS):
            with pytest.raises(StoreUnavailable):
                world.settle()
    assert "with another MAC" in only_held(world.settle()).method
    assert world.stored().first.mac != held.first.mac


def test_a_node_that_took_our_address_over_is_not_fought():
    world, held = running()
    world.put(lease(ip=IP2, mac=MAC_B, node=OTHER))
    world.answer = SOMEBODY
    lost, denied = world.settle()
    assert isinstance(lost, Lost)
    assert isinstance(denied, Denied)


def test_our_record_written_over_by_flannel_on_this_node_is_ours():
    world, held = running()
    assert held.v4 is not None
    world.put(held._replace(node=""))
    assert only_held(world.settle()).lease.node == str(ME)


def test_garbage_over_our_record_is_written_over_on_its_revision():
    world, held = running()
    world.store.put(held.key, b"garbage", held.handle)
    again = only_held(world.settle())
    assert again.warn
    assert world.stored().same_claim(held)
    assert world.stored().handle == held.handle


@pytest.mark.parametrize("expired", [False, True])
@pytest.mark.parametrize("value", [b"garbage", encode_value(lease(ip=IP9, mac=MAC_B))], ids=["garbage", "another node"])
def test_what_somebody_put_over_our_record_leaves_no_lease_of_theirs(value, expired):
    """Theirs may end at any time, or never: with none the record would outlive this node."""
    world, held = running()
    world.store.put(held.key, value, 0)
    if expired:
        del world.store.leases[held.handle]
    only_held(world.settle())
    assert world.stored().same_claim(held)
    assert (world.stored().handle == held.handle) is not expired
    assert world.store.leases[world.stored().handle] > 0


def test_a_new_address_of_this_node_goes_into_the_record():
    world, held = running()
    moved = only_held(world.settle(ip=IP3)).lease
    assert moved.key == held.key
    assert moved.v4 is not None
    assert moved.v4.public_ip == IP3
    assert world.stored() == moved


def test_an_older_record_that_overlaps_wins():
    world = World()
    world.store.put("10.244.4.0-23", encode_value(lease("10.244.4.0/23", ip=IP9, mac=MAC_B)))
    ours = world.put(lease(node=ME))
    world.tenure.held = ours
    events = world.settle(device_mac=MAC_A)
    assert isinstance(events[0], Lost)
    assert isinstance(events[1], Held)
    assert events[1].lease.key != ours.key


def test_two_devices_that_started_with_one_mac_end_with_two():
    world = World()
    world.put(lease("10.244.9.0/24", ip=IP9, mac=MAC_A, node=OTHER))
    ours = world.put(lease(node=ME, mac=MAC_A))
    world.tenure.held = ours
    held = only_held(world.settle()).lease
    assert held.key == ours.key
    assert held.v4 is not None
    assert held.v4.mac not in (None, MAC_A)


def test_a_reservation_is_kept_without_a_ttl():
    world = World(answer=NOBODY)
    world.put(lease(), left=None)
    held = only_held(world.settle()).lease
    assert held.handle == 0
    assert world.tenure.renew().left_s is None
    assert world.stored().handle == 0


def test_renewing_an_expired_lease_says_so():
    world, held = running()
    world.store.leases.clear()
    with pytest.raises(LeaseExpired):
        world.tenure.renew()


def test_identities_are_read_back_as_written():
    assert Identity.read(str(ME)) == ME
    link_only = Identity("", "", "02:00:00:00:00:02")
    assert Identity.read(str(link_only)) == link_only
    assert str(Identity("", "", "")) == ""
    assert not link_only.same_node(link_only), "nothing but a MAC names no node"
    assert link_only.same_link(link_only)
    assert not Identity("", "", "").same_link(Identity("", "", ""))


def test_a_loss_is_told_also_when_the_store_breaks_off_in_the_middle():
    world, held = running()
    world.store.delete(held.key)
    world.put(lease(ip=IP9, mac=MAC_B, node=OTHER))

    def breaks(_wanted):
        raise StoreUnavailable("gone")

    world.store.before_create = breaks
    with pytest.raises(StoreUnavailable):
        world.settle()
    assert [type(event) for event in world.tenure.unreported] == [Lost]
    world.store.before_create = lambda _wanted: None
    lost, new = world.settle()
    assert isinstance(lost, Lost)
    assert isinstance(new, Held)


def test_the_mac_of_the_device_survives_the_loss_of_the_subnet():
    world, held = running()
    world.store.delete(held.key)
    world.put(lease(ip=IP9, mac=MAC_B, node=OTHER))
    _, new = world.settle()
    assert isinstance(new, Held)
    assert new.lease.v4 is not None
    assert held.v4 is not None
    assert new.lease.v4.mac == held.v4.mac


def test_a_list_from_before_our_own_write_is_not_believed():
    world = World(answer=NOBODY)
    world.put(lease(node=OTHER))
    stale = world.store.read()
    only_held(world.settle())
    claim = Claim(CONFIG, IP2, None, ME, None)
    assert world.tenure.settle(claim, stale) == []


def test_the_flag_counts_for_the_first_lease_only():
    world = World(answer=SOMEBODY)
    world.put(lease(node=OTHER))
    only_held(world.settle(take_over=True))
    world.put(lease(mac=MAC_B, node=OTHER))
    lost, denied = world.settle(take_over=True)
    assert isinstance(lost, Lost)
    assert isinstance(denied, Denied), "two nodes with the flag do not fight"


def test_the_old_record_goes_later_when_the_store_does_not_do_it_now():
    world = World(config=parse_config('{"Network":"10.244.0.0/16","SubnetMin":"10.244.100.0"}'))
    world.put(lease(node=ME))
    real, world.store.remove = world.store.remove, lambda _lease: (_ for _ in ()).throw(StoreUnavailable("not now"))
    held = only_held(world.settle(device_mac=MAC_A)).lease
    assert "10.244.5.0-24" in world.store.records
    world.store.remove = real
    world.settle(device_mac=MAC_A)
    assert list(world.store.records) == [held.key]


@pytest.mark.parametrize("length", [20, 23, 24, 25, 28])
def test_what_is_occupied_is_what_a_plain_search_says(length, rng):
    """Records of the config's own length are found by key, others by index: both ways agree with looking at all."""
    world = World()
    for _ in range(60):
        size = rng.choice([22, 24, 24, 24, 25])
        base = ip_number("10.244.64.0", 4) + (rng.randrange(1 << 12) >> (32 - size) << (32 - size))
        subnet = f"{ip_text(4, base)}/{size}"
        key = subnet.replace("/", "-") + rng.choice(["", "", f"&fd00:1:0:{rng.randrange(99):x}::-64"])
        world.store.put(key, encode_value(lease(subnet)))
    snapshot = world.store.read()
    taken = Occupied(snapshot, Claim(CONFIG, IP2, None, ME, None))
    for _ in range(100):
        base = ip_number("10.244.64.0", 4) + (rng.randrange(1 << 12) >> (32 - length) << (32 - length))
        asked = Prefix(4, base, length)
        plain = sorted(key for key, it in snapshot.leases.items() if it.v4 is not None and it.v4.subnet.overlaps(asked))
        assert sorted(taken.overlapping(asked)) == plain
        assert taken.free(asked) == (not plain)
