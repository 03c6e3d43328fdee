"""Disputes between records end the same way whatever the order of arrival."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lease.families import FAMILIES, V4
from lease.model import Lease, prefix
from lease.records.packed import Leases, number
from overlay.peers.plan import quick, refusal
from overlay.peers.table import PeerTable
from tests.support.make import in_family, lease, node, node_in


def table(family: int = 4) -> PeerTable:
    here = node_in(family)
    return PeerTable(FAMILIES[family], lambda record: refusal(here, record), quick(here))


def accepted(of: PeerTable) -> set[str]:
    return {peer.key for peer in of.accepted()}


A = lease("10.244.8.0/24", "192.168.1.8", created=1)
B = lease("10.244.8.0/23", "192.168.1.9", created=2)
C = lease("10.244.9.0/24", "192.168.1.10", created=3)


def test_the_earlier_claim_wins_whatever_the_order():
    for order in ((A, B, C), (C, B, A), (B, A, C), (B, C, A)):
        it = table()
        for record in order:
            it.put(record)
        assert accepted(it) == {A.key, C.key}, "B lost to A, so it takes nothing from C"
        assert "older" in it.refused[B.key]


def test_the_loser_moves_up_when_the_winner_goes():
    it = table()
    for record in (A, B, C):
        it.put(record)
    turned = it.drop(A.key)
    assert accepted(it) == {B.key}
    assert turned == {A.key: (A, None), B.key: (None, B), C.key: (C, None)}


def test_one_mac_behind_two_addresses_is_a_dispute():
    it = table()
    one = lease("10.244.8.0/24", "192.168.1.8", "0a:00:00:00:00:77", created=2)
    other = lease("10.244.9.0/24", "192.168.1.9", "0a:00:00:00:00:77", created=1)
    it.load(Leases.of([one, other]))
    assert accepted(it) == {other.key}, "of those that were there at first the older has it"
    assert "VtepMAC" in it.refused[one.key]
    it = table()
    it.put(one)
    it.put(other)
    assert accepted(it) == {one.key}, "then who was there"


@pytest.mark.parametrize("tells", [True, False], ids=["etcd", "Nodes"])
def test_an_older_record_takes_no_mac_in_place(tells):
    """tells: whether the store says when a record changed."""
    it = table()
    older = lease("10.244.8.0/24", "192.168.1.8", "0a:00:00:00:00:08", created=1)._replace(modified=1 * tells)
    good = lease("10.244.9.0/24", "192.168.1.9", "0a:00:00:00:00:09", created=2)._replace(modified=2 * tells)
    it.load(Leases.of([older, good]))
    thief = older._replace(v4=older.v4._replace(mac=good.v4.mac), modified=9 * tells)
    assert it.put(thief) == {older.key: (older, None)}
    assert it.refused == {older.key: f"VtepMAC 0a:00:00:00:00:09 is already used by {good.key}, which had it first"}
    renewed = good._replace(modified=10 * tells)
    it.put(renewed)  # flannel renews its record by writing it again
    it.replace(Leases.of([thief, renewed]))
    assert accepted(it) == {good.key}
    it.drop(older.key)
    it.put(thief._replace(modified=11 * tells))
    assert accepted(it) == {good.key}, "nor when it goes and comes again"
    again = PeerTable(V4, it._judge, it._quick, it.listed)
    again.load(it.records())
    assert accepted(again) == {good.key}, "nor when all is planned anew"
    it.put(older._replace(modified=12 * tells))
    assert accepted(it) == {older.key, good.key}, "with a MAC of its own it is a peer again"
    it.drop(good.key)
    assert it.put(thief._replace(modified=13 * tells))[older.key][1].v4.mac == good.v4.mac, "nobody has it any more"


def test_who_starts_later_goes_by_age_whoever_was_written_last():
    """flannel renews by writing: the revision says nothing of since when it has its MAC."""
    renewed = lease("10.244.8.0/24", "192.168.1.8", "0a:00:00:00:00:08", created=1)._replace(modified=900)
    beside = lease("10.244.9.0/24", "192.168.1.9", "0a:00:00:00:00:08", created=500)._replace(modified=500)
    it = table()
    it.load(Leases.of([beside, renewed]))
    assert accepted(it) == {renewed.key}


def test_thousands_of_records_with_one_mac_cost_no_more_than_a_look_at_each():
    """Counted in comparisons of ages, not in time."""
    here, asked = node(), Counter()

    def judge(record: Lease) -> str | None:
        asked[record.key] += 1
        return refusal(here, record)

    def many(count: int) -> list[Lease]:
        return [
            lease(
                f"10.244.{8 + n // 64}.{n % 64 * 4}/30",
                f"192.168.1.{8 + (n > count // 2)}",
                "0a:00:00:00:00:77",
                created=n,
            )
            for n in range(1, count)
        ]

    it = PeerTable(V4, judge)
    it.load(Leases.of(many(4000)))
    assert len(accepted(it)) == 2000
    assert max(asked.values()) == 1
    looks = Counter()
    plain, it.peer = it.peer, lambda there: looks.update(["peer"]) or plain(there)
    for record in many(4000)[:20]:
        it.drop(record.key)
        it.put(record)
    assert looks["peer"] < 20 * 20, "a change looks at those it concerns"


@pytest.mark.parametrize("kind", ["one MAC, an address each", "one subnet, a key each"])
def test_thousands_in_dispute_may_go_at_once_oldest_first(kind):
    """One delete of all, or one etcd lease that ends: each is looked at once or twice."""
    there, count = [], 3000
    for n in range(count):
        one = lease(
            f"10.244.{8 + n // 64}.{n % 64 * 4}/30",
            f"192.168.{2 + n // 250}.{1 + n % 250}",
            "0a:00:00:00:00:77",
            created=n,
        )
        if kind.startswith("one subnet"):
            one = lease("10.244.8.0/24", "192.168.1.8", created=n)._replace(key=f"10.244.8.0-24&fd00:{n:x}::-64")
        there.append(one)
    it = PeerTable(V4, lambda record: refusal(node(), record))
    it.load(Leases.of(there))
    assert len(accepted(it)) == 1
    looks = Counter()
    plain, it._settle_mac = it._settle_mac, lambda *args: looks.update(["settled"]) or plain(*args)
    older, it._older_rival = it._older_rival, lambda one: looks.update(["looked"]) or older(one)
    it.change({record.key: None for record in there[:-1]})
    assert accepted(it) == {there[-1].key}
    assert looks["settled"] + looks["looked"] < 5, looks


@pytest.mark.parametrize("wide", ["oldest", "youngest", "but one"])
def test_a_write_over_thousands_of_subnets_costs_what_it_changes(wide):
    """Counted in records that are looked at. As long as the wide record's claim is the same, nobody else's changes by it."""
    here, count = node(network=prefix("10.0.0.0/8")), 8000
    small = [
        lease(f"10.{64 + n // 256}.{n % 256}.0/24", f"192.168.{2 + n // 250}.{1 + n % 250}", created=10 + n)
        for n in range(count)
    ]
    created = {"oldest": 1, "youngest": 99999, "but one": 10}[wide]
    large = [
        lease("10.64.0.0/10", "172.16.0.1", f"0a:00:00:01:00:{mac:02x}", created=created)._replace(modified=mac)
        for mac in range(50)
    ]
    if wide == "but one":  # older than all but one, which is found last
        small[-1] = small[-1]._replace(created=5)
    it = PeerTable(V4, lambda record: refusal(here, record))
    it.load(Leases.of([*small, large[0]]))
    assert len(accepted(it)) == (1 if wide == "oldest" else count)
    looks = Counter()
    plain, it.peer = it.peer, lambda there: looks.update(["peer"]) or plain(there)
    older, it._older_rival = it._older_rival, lambda one: looks.update(["settled"]) or older(one)
    losers, it._losers_after = it._losers_after, lambda one: looks.update(["losers"]) or losers(one)
    for record in large[1:]:
        assert len(it.put(record)) == (wide == "oldest")
    assert looks["settled"] == len(large[1:])
    assert looks["losers"] == 0
    assert looks["peer"] < 10 * len(large), looks
    it.drop(large[0].key)
    assert len(accepted(it)) == count


def test_two_subnets_of_one_node_both_stand():
    it = table()
    it.put(lease("10.244.8.0/24", "192.168.1.8", "0a:00:00:00:00:77"))
    it.put(lease("10.244.9.0/24", "192.168.1.8", "0a:00:00:00:00:77"))
    assert len(accepted(it)) == 2


def test_a_record_that_is_faulty_itself_disturbs_nobody():
    it = table()
    it.put(lease("10.244.8.0/23", "127.0.0.1", created=0))
    it.put(A)
    assert accepted(it) == {A.key}


def test_a_change_says_what_was_and_what_is():
    it = table()
    assert it.put(A) == {A.key: (None, A)}
    moved = A._replace(modified=9, v4=A.v4._replace(public_ip=A.v4.public_ip + 50))
    assert it.put(moved) == {A.key: (A, moved._replace(modified=A.modified))}, "it has its MAC since then"
    assert it.put(moved) == {}
    assert it.drop("10.244.77.0-24") == {}


def by_the_plain_rule(records: list[Lease], listed: int = 0, family: int = 4) -> set[str]:
    """In its plainest form: a MAC is the address's that had it first, all that was listed first at once; then, by age, each
    takes its subnet unless an accepted one is in the way."""
    here = node_in(family)
    sound = [record for record in records if refusal(here, record) is None]
    owner: dict[int, int] = {}
    for record in sorted(sound, key=lambda r: (r.modified if r.modified > listed else 0, r.created, r.key)):
        owner.setdefault(record.first.mac, record.first.public_ip)
    taken: list[Lease] = []
    for record in sorted(sound, key=lambda r: (r.created, r.key)):
        free = not any(other.first.subnet.overlaps(record.first.subnet) for other in taken)
        if owner[record.first.mac] == record.first.public_ip and free:
            taken.append(record)
    return {record.key for record in taken}


subnets = st.sampled_from(
    [f"10.244.{n}.0/24" for n in range(8, 16)]
    + ["10.244.8.0/22", "10.244.8.0/23", "10.244.12.0/22", "10.244.8.128/25", "10.245.0.0/24", "10.244.2.0/24"]
)
records = st.builds(
    lambda subnet, host, mac, created: lease(subnet, f"192.168.1.{host}", f"0a:00:00:00:00:{mac:02x}", created=created),
    subnets,
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(1, 5),
)
steps = st.lists(
    st.tuples(st.sampled_from(["put", "drop", "replace", "change", "plan"]), st.lists(records, min_size=1, max_size=6)), max_size=12
)  # fmt: skip


@given(st.lists(records, max_size=6), steps, st.booleans(), st.sampled_from([4, 6]))
def test_any_history_ends_where_the_plain_rule_says(first, history, tells, family):
    """tells: the store says when a record changed (etcd; a Node does not)."""
    it, now = table(family), 10
    there = {record.key: in_family(record, family)._replace(modified=now * tells) for record in first}
    it.load(Leases.of(there.values()))
    since = dict.fromkeys(there, 0)  # in the order in which they came to have their MAC
    before = accepted(it)
    for what, batch in history:
        now += 1
        turned: dict = {}
        made = (in_family(record, family)._replace(modified=now * tells) for record in batch)
        batch = {record.key: record for record in made}  # noqa: PLW2901
        old = dict(there)
        if what == "replace":
            there = batch
            turned = it.replace(Leases.of(there.values()))
        elif what == "plan":  # the node changed: all is judged anew, and what is known of MACs is kept
            again = PeerTable(FAMILIES[family], it._judge, it._quick, it.listed)
            again.load(it.records())
            it = again
        elif what == "drop":
            turned = it.change(dict.fromkeys(batch)) if len(batch) > 1 else it.drop(next(iter(batch)))
            there = {key: record for key, record in there.items() if key not in batch}
        elif what == "change":
            there |= batch
            turned = it.change(batch)
        else:
            (key, record), *_ = batch.items()
            there[key] = record
            turned = it.put(record)
        for place, (key, record) in enumerate(there.items()):
            was = old.get(key)
            if was is None or was.created != record.created or was.first.mac != record.first.mac:
                since[key] = now * 100 + place
        peers = accepted(it)
        if what != "plan":
            assert {key for key, (was, is_) in turned.items() if was is None} == peers - before
            assert {key for key, (was, is_) in turned.items() if is_ is None} == before - peers
        before = peers
        known = dict(it.records())
        claims = {key: (record[:5], record.created) for key, record in known.items()}
        assert claims == {key: (record[:5], record.created) for key, record in there.items()}
        for key, record in known.items():  # listed first, or later: as the model says
            assert (record.modified > (it.listed or 0)) == (since[key] > 0), (
                key,
                record.modified,
                it.listed,
                since[key],
            )
        assert peers == by_the_plain_rule(list(known.values()), it.listed or 0, family)
        assert it.refused.keys() == there.keys() - peers
        assert all(it.refused.values())
        assert len(it) == len(there)
        consistent(it)
        fresh = table(family)
        fresh.load(Leases.of(there.values()))
        at_first = [record._replace(modified=0) for record in there.values()]
        assert accepted(fresh) == by_the_plain_rule(at_first, family=family)
        consistent(fresh)


def consistent(it: PeerTable) -> None:
    """The ways to a peer agree."""
    numbers = {number(peer.first.subnet) for peer in it.accepted()}
    assert it.packed.keys() == numbers
    assert {there for mac in it.by_mac for there in it.with_mac(mac)} == numbers
    assert it.lengths == Counter(there & 255 for there in numbers)
