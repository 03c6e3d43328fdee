"""Disputes between records end the same way whatever the order of arrival."""

from collections import Counter

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
    assert it.put(moved) == {A.key: (A, moved)}
    assert it.put(moved) == {}
    assert it.drop("10.244.77.0-24") == {}


def greedy(records: list[Lease]) -> set[str]:
    """The rule, in its plainest form: by age, each takes its place unless an accepted one is in the way."""
    here = node()
    taken: list[Lease] = []
    for record in sorted(records, key=lambda r: (r.created, r.key)):
        if refusal(here, record) is None and not any(
            other.v4.subnet.overlaps(record.v4.subnet)
            or (other.v4.mac == record.v4.mac and other.v4.public_ip != record.v4.public_ip)
            for other in taken
        ):
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
    st.tuples(st.sampled_from(["put", "drop", "replace"]), st.lists(records, min_size=1, max_size=6)), max_size=12
)


@given(steps)
def test_any_history_ends_where_the_plain_rule_says(history):
    it = table()
    model: dict[str, Lease] = {}
    before = accepted(it)
    for what, batch in history:
        turned: dict = {}
        if what == "replace":
            model = {record.key: record for record in batch}
            turned = it.replace(Leases.of(model.values()))
        for record in batch if what != "replace" else []:
            if what == "put":
                model[record.key] = record
                turned = it.put(record)
            else:
                model.pop(record.key, None)
                turned = it.drop(record.key)
            now = accepted(it)
            assert {key for key, (was, is_) in turned.items() if was is None} == now - before
            assert {key for key, (was, is_) in turned.items() if is_ is None} == before - now
            before = now
        before = accepted(it)
        assert accepted(it) == greedy(list(model.values()))
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
