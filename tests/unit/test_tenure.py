"""How a node gets its lease: which record is its own, which subnet it takes, and when it refuses."""

import random

import pytest

from lease.config import parse_config
from lease.model import ip_number, prefix
from lease.records.codec import encode_value
from lease.store import StoreUnavailable, SubnetTaken
from lease.tenure.claim import Claim, Identity
from lease.tenure.etcd import Tenure
from lease.tenure.events import Denied, Held, Lost, Partial, Renewed
from lease.tenure.keeper import TenureThread
from tests.support.tenure import (
    CLONE,
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
from tests.support.wait import until


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


def test_report_9_a_network_that_the_underlay_takes_says_so():
    config = parse_config('{"Network":"192.168.1.0/24","SubnetLen":26}')
    claim = Claim(
        config, IP2, None, ME, None, avoid=(prefix("192.168.1.0/24"), prefix("192.168.1.2/32")), interface="eth0"
    )
    (denied,) = World(config=config).tenure.settle(claim)
    assert "3 of them touch this node's underlay 192.168.1.0/24 (eth0)" in denied.reason
    far = claim._replace(avoid=(prefix("10.0.0.0/8"),))
    world = World(config=config)
    for base in (64, 128, 192):
        world.put(lease(f"192.168.1.{base}/26", IP9 + base, 0x0A0000000000 + base))
    (denied,) = world.tenure.settle(far)
    assert "touch" not in denied.reason


@pytest.mark.parametrize(
    ("there", "count"),
    [("10.244.0.0/16", 255), ("10.244.7.0/24", 1), ("10.244.7.9/32", 1), ("10.244.8.0/22", 4), ("10.244.0.0/24", 0),
     ("10.245.0.0/16", 0), ("fd00::/8", 0), ("0.0.0.0/0", 255)],
)  # fmt: skip
def test_how_many_subnets_a_prefix_touches(there, count):
    assert CONFIG.v4.touched_by(prefix(there)) == count


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


@pytest.mark.parametrize(
    "error", [SubnetTaken("raced"), StoreUnavailable("gone for a moment")], ids=["a race", "no answer"]
)
def test_what_the_lease_lacks_is_told_whatever_is_raised_since_it_was_found(error):
    """By it the family is asked for again, and the operator knows."""
    config = parse_config('{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"}')
    world = World(config=config)
    create, raised = world.store.create, []

    def once(*asked):
        if not raised:
            raised.append(1)
            raise error
        return create(*asked)

    world.store.create = once
    if isinstance(error, StoreUnavailable):
        with pytest.raises(StoreUnavailable):
            world.settle()
    held, partial = world.settle()
    assert isinstance(held, Held)
    assert partial == Partial("this node has no IPv6 address of its own")
    assert world.settle() == [], "once"
    world.config = CONFIG
    assert Partial("") in world.settle()


def test_an_old_record_that_could_not_be_removed_is_removed_later():
    """Nobody tells of it: it would keep a subnet from others for a day."""
    world = World()
    old = world.put(lease("10.244.5.0/24", IP2, MAC_A, ME))
    world.config = parse_config('{"Network":"10.244.0.0/16","SubnetMin":"10.244.9.0","SubnetMax":"10.244.9.0"}')
    remove, refused = world.store.remove, []

    def once(there):
        if not refused:
            refused.append(there)
            raise StoreUnavailable("gone for a moment")
        remove(there)

    world.store.remove = once
    assert str(only_held(world.settle(device_mac=MAC_A)).lease.first.subnet) == "10.244.9.0/24"
    before = world.tenure.unfinished, old.key in world.store.records
    assert world.settle(device_mac=MAC_A) == [], "nor is it somebody who has our MAC"
    after = world.tenure.unfinished, old.key in world.store.records
    assert (before, after) == ((True, True), (False, False))


class Unfinished:
    """A Holder that has something left to do after its first settling."""

    def __init__(self) -> None:
        self.held, self.unreported, self.settled = lease(), [], 0

    @property
    def unfinished(self) -> bool:
        return self.settled < 2

    def settle(self, _claim, _snapshot=None):
        self.settled += 1
        return []

    def renew(self) -> Renewed:
        return Renewed(None)


def test_what_is_unfinished_is_settled_again_without_news():
    holder = Unfinished()
    thread = TenureThread(holder, lambda _event: None)
    thread.start()
    thread.claim(Claim(CONFIG, IP2, None, ME, None, False))
    until("it is settled again", lambda: holder.settled == 2)
    thread.stop()
    thread.join()
    assert holder.settled == 2


def test_an_old_record_that_is_ours_again_is_not_removed():
    """The one in its place was lost, and the range allows it again."""
    world = World()
    world.put(lease("10.244.5.0/24", IP2, MAC_A, ME))
    narrow = parse_config('{"Network":"10.244.0.0/16","SubnetMin":"10.244.9.0","SubnetMax":"10.244.9.0"}')
    world.config = narrow
    remove = world.store.remove

    def refuse(_there):
        raise StoreUnavailable("gone for a moment")

    world.store.remove = refuse
    world.settle(device_mac=MAC_A)
    world.store.remove = remove
    world.store.delete("10.244.9.0-24")
    world.put(lease("10.244.9.0/24", IP9, MAC_B, OTHER))
    world.config = CONFIG
    for _ in range(3):
        world.settle(device_mac=MAC_A)
    assert world.tenure.held is not None
    assert world.tenure.held.key == "10.244.5.0-24"
    assert "10.244.5.0-24" in world.store.records
    assert not world.tenure.unfinished
