"""The Store's contract, run against the real etcd and against the fake that other tests trust."""

import json

import pytest

from lease.model import Endpoint, Lease, Refused, prefix
from lease.records.codec import encode_value
from lease.store import Changes, ConfigText, Gone, LeaseExpired, RecordChanged, SubnetTaken
from tests.support.fake_store import FakeStore


def lease(subnet="10.244.5.0/24", ip=0xC0A80102, mac=0x0A0000000002) -> Lease:
    return Lease(subnet.replace("/", "-"), "vxlan", Endpoint(prefix(subnet), ip, 1, mac), None, "m/n/l", 0, 0, 0)


@pytest.fixture(params=["etcd", "fake"])
def world(request, prefix, open_store):
    """(store, put, delete, expire)"""
    if request.param == "fake":
        fake = FakeStore()
        return fake, fake.put, fake.delete, lambda it: fake.leases.pop(it.handle)
    etcd = request.getfixturevalue("shared_etcd")
    where = f"{prefix}/subnets/"
    etcd.put(f"{prefix}/config", '{"Network":"10.244.0.0/16"}')
    store = open_store(etcd.endpoint, prefix=prefix)
    return (
        store,
        lambda key, value: etcd.put(where + key, value),
        lambda key: etcd.delete(where + key),
        lambda it: etcd.revoke(it.handle),
    )


def test_what_is_created_is_read(world):
    store, *_ = world
    made = store.create(lease(), 100)
    found = store.read()
    assert found.config == b'{"Network":"10.244.0.0/16"}'
    assert found.leases == {made.key: made}
    assert made.created == made.modified > 0
    assert made.handle
    assert store.lifetime(made).left_s == pytest.approx(100, abs=3)


@pytest.mark.parametrize("there", ["10.244.5.0-24", "10.244.5.0-25", "10.244.5.0-24&fd00:1::-64", "10.244.5.0-x"])
def test_create_is_refused_while_any_record_stands_on_that_base(world, there):
    store, put, *_ = world
    put(there, encode_value(lease()))
    before = store.read()
    with pytest.raises(SubnetTaken):
        store.create(lease(), 100)
    assert store.read()[1:] == before[1:]


def test_records_beside_it_do_not_matter(world):
    store, put, *_ = world
    for key in ("10.244.50.0-24", "10.244.6.0-24", "110.244.5.0-24", "10.244.5.128-25"):
        put(key, encode_value(lease()))
    assert store.create(lease(), 100).key == "10.244.5.0-24"


def test_a_change_is_fenced_by_the_revision(world):
    store, put, *_ = world
    made = store.create(lease(), 100)
    changed = store.change(made, made._replace(node="m/other/l"))
    assert (changed.created, changed.handle) == (made.created, made.handle)
    assert changed.modified > made.modified
    assert store.read().leases[made.key] == changed
    for stale in (made, changed._replace(modified=changed.modified + 5)):
        with pytest.raises(RecordChanged):
            store.change(stale, made)
        with pytest.raises(RecordChanged):
            store.remove(stale)
    assert store.read().leases[made.key] == changed
    store.remove(changed)
    assert store.read().leases == {}
    with pytest.raises(RecordChanged):
        store.change(changed, made)


def test_a_change_may_bring_an_etcd_lease_of_its_own(world):
    store, put, *_ = world
    put("10.244.5.0-24", encode_value(lease()))
    there = store.read().leases["10.244.5.0-24"]
    changed = store.change(there, there._replace(node="m/x/l"), 100)
    assert changed.handle
    assert store.read().leases["10.244.5.0-24"] == changed
    assert 90 < store.lifetime(changed).left_s <= 100
    with pytest.raises(RecordChanged):
        store.change(there, there, 100)
    assert store.read().leases["10.244.5.0-24"] == changed


def test_a_reservation_stays_without_a_ttl(world):
    store, put, *_ = world
    put("10.244.5.0-24", encode_value(lease()))
    there = store.read().leases["10.244.5.0-24"]
    assert there.handle == 0
    changed = store.change(there, there._replace(node="m/x/l"))
    assert changed.handle == 0
    assert store.read().leases["10.244.5.0-24"].handle == 0
    assert store.keep_alive(changed).left_s is None
    assert store.lifetime(changed).left_s is None


def test_an_expired_lease_is_told(world):
    store, _, _, expire = world
    made = store.create(lease(), 100)
    assert store.keep_alive(made).left_s
    expire(made)
    with pytest.raises(LeaseExpired):
        store.keep_alive(made)
    with pytest.raises(LeaseExpired):
        store.lifetime(made)


def test_a_record_nobody_can_read_is_refused_alone(world):
    store, put, *_ = world
    made = store.create(lease(), 100)
    put("not-a-subnet", b"x")
    put("10.244.9.0-24", b"garbage")
    found = store.read()
    assert found.leases == {made.key: made}
    assert found.refused.keys() == {"not-a-subnet", "10.244.9.0-24"}


def test_the_watch_tells_what_comes_after_the_list(world):
    store, put, delete, _ = world
    put("10.244.1.0-24", encode_value(lease("10.244.1.0/24")))
    listed = store.read()
    put("10.244.2.0-24", encode_value(lease("10.244.2.0/24")))
    told: list = []
    watching = store.watch(listed.revision)

    def next_change():
        while not told:
            changes = next(watching)
            assert isinstance(changes, Changes)
            told.extend(changes.changes)
        return told.pop(0)

    first = next_change()
    assert isinstance(first, Lease)
    assert first.key == "10.244.2.0-24"
    delete("10.244.1.0-24")
    assert next_change() == Gone("10.244.1.0-24")
    put("10.244.2.0-24", b"garbage")
    broken = next_change()
    assert isinstance(broken, Refused)
    assert "JSON" in broken.reason
    made = store.create(lease("10.244.7.0/24"), 100)
    assert next_change() == made


def test_the_value_is_flannels_byte_for_byte(shared_etcd, prefix, open_store):
    store = open_store(shared_etcd.endpoint, prefix=prefix)
    made = store.create(lease()._replace(node=""), 86_400)
    ((key, kv),) = shared_etcd.get(prefix).items()
    assert key == f"{prefix}/subnets/10.244.5.0-24"
    assert (
        kv["value"]
        == b'{"PublicIP":"192.168.1.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0a:00:00:00:00:02"}}'
    )
    assert kv["lease"] == made.handle
    assert 86_390 <= shared_etcd.time_to_live(kv["lease"]) <= 86_400


def test_config_changes_are_told(shared_etcd, prefix, open_store):
    store = open_store(shared_etcd.endpoint, prefix=prefix)
    watching = store.watch(store.read().revision)
    shared_etcd.put(f"{prefix}/config", "{}")
    assert next(watching).changes == (ConfigText(b"{}"),)
    shared_etcd.delete(f"{prefix}/config")
    assert next(watching).changes == (ConfigText(None),)


def test_keys_of_other_networks_below_or_beside_the_prefix_are_nobodys(shared_etcd, prefix, open_store):
    shared_etcd.put(f"{prefix}/config", "{}")
    shared_etcd.put(f"{prefix}/other/subnets/10.1.1.0-24", "x")
    shared_etcd.put(f"{prefix}x/subnets/10.1.1.0-24", "x")
    found = open_store(shared_etcd.endpoint, prefix=f"//{prefix}//").read()
    assert (found.config, found.leases, found.refused) == (b"{}", {}, {})


def test_every_byte_in_a_key_is_survived(shared_etcd, prefix, open_store):
    store = open_store(shared_etcd.endpoint, prefix=prefix)
    for number, bad in enumerate([b"\xff\xfe", "ünï\n\x1b[31m".encode(), b"x" * 3000]):
        shared_etcd.put(f"{prefix}/subnets/".encode() + bad, json.dumps(number))
    found = store.read()
    assert len(found.refused) == 3
    assert all(key.isprintable() and len(key) <= 120 for key in found.refused)
