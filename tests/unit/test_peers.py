"""Disputes between records end the same way whatever the order of arrival."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lease.model import Lease
from lease.packed import Leases, number
from overlay.peers import PeerTable
from overlay.plan import quick, refusal
from tests.support.make import lease, node


def table() -> PeerTable:
    here = node()
    return PeerTable(lambda record: refusal(here, record), quick(here))


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
    it.put(lease("10.244.8.0/24", "192.168.1.8", "0a:00:00:00:00:77", created=2))
    it.put(lease("10.244.9.0/24", "192.168.1.9", "0a:00:00:00:00:77", created=1))
    assert accepted(it) == {"10.244.9.0-24"}
    assert "VtepMAC" in it.refused["10.244.8.0-24"]


@pytest.mark.parametrize("tells", [True, False], ids=["etcd", "Nodes"])
def test_an_older_record_takes_no_mac_in_place(tells):
    """tells: whether the store says when a record changed."""
    it = table()
    older = lease("10.244.8.0/24", "192.168.1.8", "0a:00:00:00:00:08", created=1)._replace(modified=1 * tells)
    good = lease("10.244.9.0/24", "192.168.1.9", "0a:00:00:00:00:09", created=2)._replace(modified=2 * tells)
    it.put(older)
    it.put(good)
    thief = older._replace(v4=older.v4._replace(mac=good.v4.mac), modified=9 * tells)
    assert it.put(thief) == {older.key: (older, None)}
    assert it.refused == {older.key: f"VtepMAC 0a:00:00:00:00:09 is already used by {good.key}, which had it first"}
    it.put(good._replace(modified=10 * tells))  # flannel renews its record by writing it again
    it.replace(Leases.of([thief, good._replace(modified=10 * tells)]))
    assert accepted(it) == {good.key}
    it.put(older._replace(modified=11 * tells))
    assert accepted(it) == {older.key, good.key}, "with a MAC of its own it is a peer again"
    turned = it.drop(good.key)
    assert it.put(thief)[older.key][1].v4.mac == good.v4.mac, "nobody has it any more"
    assert turned.keys() == {good.key}


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

    it = PeerTable(judge)
    it.load(Leases.of(many(4000)))
    assert len(accepted(it)) == 2000
    assert max(asked.values()) == 1
    looks = Counter()
    plain, it.peer = it.peer, lambda there: looks.update(["peer"]) or plain(there)
    for record in many(4000)[:20]:
        it.drop(record.key)
        it.put(record)
    assert looks["peer"] < 20 * 20, "a change looks at those it concerns"


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


def by_the_plain_rule(records: list[Lease]) -> set[str]:
    """In its plainest form: a MAC is the address's that had it first; then, by age, each takes its subnet unless an accepted
    one is in the way."""
    here = node()
    sound = [record for record in records if refusal(here, record) is None]
    owner: dict[int, int] = {}
    for record in sorted(sound, key=lambda r: (r.modified, r.created, r.key)):
        owner.setdefault(record.v4.mac, record.v4.public_ip)
    taken: list[Lease] = []
    for record in sorted(sound, key=lambda r: (r.created, r.key)):
        free = not any(other.v4.subnet.overlaps(record.v4.subnet) for other in taken)
        if owner[record.v4.mac] == record.v4.public_ip and free:
            taken.append(record)
    return {record.key for record in taken}


def entered(model: dict[str, Lease], record: Lease, now: int, tells: bool) -> Lease:
    """A record with the revision since which it has its MAC. tells: the store says when a record changed."""
    was = model.get(record.key)
    if was is not None and was.created == record.created:
        same = was.v4.mac == record.v4.mac
        return record._replace(modified=was.modified if same else now)
    return record._replace(modified=now if tells else 0)


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
    st.tuples(st.sampled_from(["put", "drop", "replace"]), st.lists(records, min_size=1, max_size=6)), max_size=12
)


@given(steps, st.booleans())
def test_any_history_ends_where_the_plain_rule_says(history, tells):
    it = table()
    model: dict[str, Lease] = {}
    before, now = accepted(it), 0
    for what, batch in history:
        turned: dict = {}
        if what == "replace":
            now += 1
            there = {record.key: record for record in batch}
            it.replace(Leases.of(record._replace(modified=now * tells) for record in there.values()))
            model = {key: entered(model, record, now, tells) for key, record in there.items()}
        for record in batch if what != "replace" else []:
            now += 1
            if what == "put":
                turned = it.put(record._replace(modified=now * tells))
                model[record.key] = entered(model, record, now, tells)
            else:
                model.pop(record.key, None)
                turned = it.drop(record.key)
            peers = accepted(it)
            assert {key for key, (was, is_) in turned.items() if was is None} == peers - before
            assert {key for key, (was, is_) in turned.items() if is_ is None} == before - peers
            before = peers
        before = accepted(it)
        if not tells:  # the table counts changes in its own way; their order is what matters
            model = {key: record._replace(modified=it.records()[key].modified) for key, record in model.items()}
        assert accepted(it) == by_the_plain_rule(list(model.values()))
        assert it.refused.keys() == model.keys() - accepted(it)
        assert dict(it.records()) == model
        assert len(it) == len(model)
        consistent(it)
        loaded = table()
        loaded.load(Leases.of(model.values()))
        assert (accepted(loaded), loaded.refused.keys()) == (accepted(it), it.refused.keys())
        consistent(loaded)


def consistent(it: PeerTable) -> None:
    """The ways to a peer agree."""
    numbers = {number(peer.v4.subnet) for peer in it.accepted()}
    assert it.packed.keys() == numbers
    assert {there for mac in it.by_mac for there in it.with_mac(mac)} == numbers
    assert it.lengths == Counter(there & 255 for there in numbers)
