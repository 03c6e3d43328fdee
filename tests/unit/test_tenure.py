"""Whose a record is, and what becomes of it: every case of the evidence, on a store in memory."""

import random

import pytest

from lease.config import parse_config
from lease.model import Endpoint, Lease, Prefix, ip_number, ip_text, mac_number, prefix
from lease.records.codec import decode_lease, encode_value
from lease.store import LeaseExpired, StoreUnavailable
from lease.tenure.claim import Answer, Claim, Identity, Occupied
from lease.tenure.etcd import Tenure
from lease.tenure.events import Denied, Held, Lost
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
        self.tenure = Tenure(self.store, self.probe, 86_400, random.Random(1))

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


def test_a_first_start_allocates_and_asks_nobody():
    world = World()
    held = only_held(world.settle())
    assert world.stored(held.lease.key) == held.lease
    assert held.lease.node == str(ME)
    assert world.asked == []


def test_a_restart_with_its_device_keeps_the_record_without_a_write_or_a_question():
    world = World(answer=SOMEBODY)
    there = world.put(lease(node=ME))
    assert only_held(world.settle(device_mac=MAC_A)).lease == there
    assert world.asked == []


def test_a_node_that_comes_from_flannel_keeps_its_record_and_adds_its_identity():
    world = World(answer=SOMEBODY)
    there = world.put(lease())
    held = only_held(world.settle(device_mac=MAC_A)).lease
    assert held.v4 == there.v4
    assert (held.node, held.handle, held.created) == (str(ME), there.handle, there.created)
    assert world.asked == []


def test_a_reboot_keeps_record_and_mac_when_nobody_else_answers():
    world = World(answer=NOBODY)
    there = world.put(lease(node=ME))
    held = only_held(world.settle())
    assert held.lease == there
    assert not held.warn
    assert world.asked == [IP2]


def test_a_changed_device_mac_is_published():
    world = World()
    world.put(lease(node=ME))
    held = only_held(world.settle(device_mac=MAC_B)).lease
    assert held.v4 is not None
    assert held.v4.mac == MAC_B
    assert world.stored() == held


@pytest.mark.parametrize(
    "who", [OTHER, Identity("", "", ""), CLONE], ids=["another node", "flannel", "a clone with our name"]
)
def test_the_second_node_on_one_address_refuses_naming_the_first(who):
    world = World(answer=SOMEBODY)
    before = world.put(lease(node=who))
    (denied,) = world.settle()
    assert isinstance(denied, Denied)
    assert denied.conflict
    assert "192.168.1.2" in denied.reason
    assert "10.244.5.0-24" in denied.reason
    assert "--take-over" in denied.reason
    assert who.called() in denied.reason
    assert world.stored() == before


@pytest.mark.parametrize("who", [OTHER, Identity("", "", "")], ids=["recycled", "of flannel"])
def test_a_recycled_address_that_nobody_answers_for_is_taken_over_loudly(who):
    world = World(answer=NOBODY)
    there = world.put(lease(node=who))
    held = only_held(world.settle())
    assert held.warn
    assert held.lease.v4 is not None
    assert there.v4 is not None
    assert held.lease.v4.subnet == there.v4.subnet
    assert held.lease.v4.mac != there.v4.mac, "its owner may live after all: never with its MAC"
    assert held.lease.node == str(ME)


@pytest.mark.parametrize(
    ("who", "left", "refused"),
    [
        pytest.param(OTHER, 86_000, True, id="fresh"),
        pytest.param(OTHER, 60_000, False, id="stale: not renewed for hours"),
        pytest.param(Identity("", "", ""), 60_000, True, id="flannel renews once in 23 h: nobody can tell"),
        pytest.param(OTHER, None, True, id="a reservation that a node came for"),
        pytest.param(Identity("", "", ""), None, False, id="a reservation that nobody came for"),
        pytest.param(ME, 86_000, False, id="ourselves after a reboot, at an address behind NAT"),
        pytest.param(CLONE, 86_000, True, id="a clone on another interface"),
    ],
)
def test_an_address_off_link_is_judged_by_freshness(who, left, refused):
    world = World(answer=UNKNOWN)
    before = world.put(lease(node=who), left)
    events = world.settle()
    assert isinstance(events[0], Denied if refused else Held)
    if refused:
        assert world.stored() == before


def test_the_flag_takes_over_whoever_answers():
    world = World(answer=SOMEBODY)
    world.put(lease(node=OTHER))
    held = only_held(world.settle(take_over=True))
    assert held.warn
    assert held.lease.key == "10.244.5.0-24"
    assert held.lease.v4 is not None
    assert held.lease.v4.mac not in (None, MAC_A), "its owner may live, and two devices never get one MAC"


def test_a_new_dhcp_address_keeps_the_subnet():
    world = World(answer=NOBODY)
    world.put(lease(ip=IP9, node=ME))
    held = only_held(world.settle()).lease
    assert held.key == "10.244.5.0-24"
    assert held.v4 is not None
    assert (held.v4.public_ip, held.v4.mac) == (IP2, MAC_A)
    assert world.asked == [IP9]


@pytest.mark.parametrize("answer", [SOMEBODY, UNKNOWN], ids=["which lives", "which nobody can ask"])
@pytest.mark.parametrize("device_mac", [None, MAC_A], ids=["no device", "a device with its MAC, from a snapshot"])
def test_a_clone_of_another_node_is_another_node(answer, device_mac):
    world = World(answer=answer)
    before = world.put(lease(ip=IP9, node=ME))
    held = only_held(world.settle(device_mac=device_mac, who=CLONE)).lease
    assert held.key != before.key
    assert held.v4 is not None
    assert held.v4.mac != MAC_A, "two devices never get one MAC"
    assert world.stored() == before


def test_of_two_records_of_our_address_the_one_with_our_mac_is_ours():
    world = World(answer=SOMEBODY)
    world.put(lease("10.244.5.0/24", mac=MAC_B))
    world.put(lease("10.244.6.0/24", mac=MAC_A, node=ME))
    assert only_held(world.settle(device_mac=MAC_A)).lease.key == "10.244.6.0-24"


def test_the_previous_subnet_is_taken_again():
    assert only_held(World().settle(previous="10.244.77.0/24")).lease.key == "10.244.77.0-24"


def test_a_record_outside_the_config_is_replaced_then_removed():
    world = World(config=parse_config('{"Network":"10.244.0.0/16","SubnetMin":"10.244.100.0"}'))
    world.put(lease(node=ME))
    held = only_held(world.settle(device_mac=MAC_A))
    assert held.warn
    assert "10.244.5.0-24" not in world.store.records
    assert held.lease.v4 is not None
    assert held.lease.v4.subnet.base >= ip_number("10.244.100.0", 4)


def test_a_lost_race_chooses_again_until_the_range_is_full():
    world = World(config=parse_config('{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.20.0"}'))
    races = iter(range(19))

    def another_is_faster(wanted):
        number = next(races, None)
        if number is not None:
            world.store.put(
                wanted.key, encode_value(lease(f"{wanted.key[:-3]}/24", ip=IP9 + number, mac=MAC_B + number))
            )

    world.store.before_create = another_is_faster
    held = only_held(world.settle()).lease
    assert len(world.store.records) == 20
    assert world.stored(held.key) == held
    world.store.before_create = lambda _lease: None
    other = Tenure(world.store, world.probe, 86_400, random.Random(2))
    (denied,) = other.settle(Claim(world.config, IP3, None, OTHER, None))
    assert isinstance(denied, Denied)
    assert not denied.conflict
    assert "20 subnets" in denied.reason


@pytest.mark.parametrize("key", ["10.244.5.0-25", "10.244.5.0-24&fd00:1::-64", "10.244.4.0-23"])
def test_no_record_of_another_form_on_that_base_is_overrun(key):
    world = World()
    world.store.put(key, encode_value(lease(ip=IP9)))
    held = only_held(world.settle(previous="10.244.5.0/24"))
    assert held.lease.key != "10.244.5.0-24"


def test_an_unreadable_record_still_occupies_its_subnet():
    world = World()
    world.store.put("10.244.5.0-24", b"garbage")
    assert only_held(world.settle(previous="10.244.5.0/24")).lease.key != "10.244.5.0-24"


def test_a_device_that_stands_proves_a_changed_address_behind_nat():
    """--public-ip was changed, nobody can be asked: the device's MAC and the interface say that this is us."""
    world = World(answer=UNKNOWN)
    world.put(lease(ip=IP9, node=ME))
    assert only_held(world.settle(device_mac=MAC_A)).lease.key == "10.244.5.0-24"


def test_clones_without_a_name_take_nothing_from_each_other():
    """One machine-id, no --node-name, another interface: a node that is cut off for a moment loses nothing."""
    world = World(answer=NOBODY)
    before = world.put(lease(ip=IP9, node=Identity("machine", "", "02:00:00:00:00:09")))
    held = only_held(world.settle(who=Identity("machine", "", "02:00:00:00:00:02"))).lease
    assert held.key != before.key
    assert world.asked == [], "a machine-id alone raises no question"


def test_a_node_without_any_machine_id_starts_again_behind_nat():
    me = Identity("", "", "02:00:00:00:00:02")
    world = World(answer=UNKNOWN)
    world.put(lease(node=me))
    assert only_held(world.settle(who=me)).lease.key == "10.244.5.0-24"


@pytest.mark.parametrize("key", ["10.244.5.0-24x", "10.244.5.0-33", "10.244.5.0-23", "10.244.5.0-"])
def test_rubbish_that_blocks_a_base_is_stepped_around(key):
    """The transaction refuses a base on which any key stands, whatever that key is worth."""
    world = World()
    world.store.put(key, b"junk")
    assert only_held(world.settle(previous="10.244.5.0/24")).lease.key != "10.244.5.0-24"
    world, held = running()
    world.store.put(key, b"junk")
    world.store.delete(held.key)
    lost, new = world.settle()
    assert isinstance(lost, Lost)
    assert isinstance(new, Held)


@pytest.mark.parametrize("key", ["10.244.0.0-16", "10.244.0.0-17", "10.0.0.0-8", "0.0.0.0-1"])
def test_one_useless_record_does_not_stop_all_allocation(key):
    world = World()
    world.store.put(key, encode_value(lease(ip=IP9, mac=MAC_B)))
    held = only_held(world.settle(previous="10.244.5.0/24")).lease
    assert held.key == "10.244.5.0-24"
    assert world.settle() == [], "nor is it a reason to give ours up, though it is older"


def test_the_underlay_is_never_leased():
    config = parse_config('{"Network":"192.168.0.0/16","SubnetMin":"192.168.1.0","SubnetMax":"192.168.2.0"}')
    for _ in range(8):
        world = World(config=config)
        claim = Claim(config, IP2, None, ME, prefix("192.168.1.0/24"), False, (prefix("192.168.1.0/24"),))
        assert only_held(world.tenure.settle(claim)).lease.key == "192.168.2.0-24"


@pytest.mark.parametrize("answer", [SOMEBODY, UNKNOWN], ids=["on-link", "behind NAT"])
def test_of_two_that_start_at_one_moment_with_one_address_the_later_gives_way(answer):
    world = World(answer=answer)

    def first_is_faster(_wanted):
        world.store.before_create = lambda _lease: None
        world.put(lease("10.244.9.0/24", mac=MAC_B, node=OTHER))

    world.store.before_create = first_is_faster
    (denied,) = world.settle()
    assert isinstance(denied, Denied)
    assert denied.conflict
    assert "n3" in denied.reason
    assert list(world.store.records) == ["10.244.9.0-24"], "ours is given back"


def test_races_that_never_end_are_paused_and_told():
    world = World()

    def always_faster(wanted):
        world.store.put(wanted.key, encode_value(lease(f"{wanted.key[:-3]}/24", ip=IP9, mac=MAC_B)))

    world.store.before_create = always_faster
    (denied,) = world.settle()
    assert isinstance(denied, Denied)
    assert "races" in denied.reason


# --- while it runs -----------------------------------------------------------------------------------------------------


def running(**options) -> tuple[World, Lease]:
    world = World(**options)
    return world, only_held(world.settle(previous="10.244.5.0/24")).lease


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
    assert "had written over it in place" in again.method
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
        [again] = world.settle()
        assert isinstance(again, Held)
        assert world.stored().same_claim(held)
    assert "see who may write there" in again.method


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
