"""The contracts of a store: where leases are read (etcd, the Nodes of a cluster, the fake that other tests trust), and where
they are taken (etcd, the fake)."""

import json

import pytest

from lease.kube.client import KubeSettings
from lease.model import Endpoint, Lease, Refused, prefix
from lease.records.annotations import Hints, Names
from lease.records.codec import encode_value
from lease.store import Changes, ConfigText, Gone, LeaseExpired, RecordChanged, SubnetTaken
from lease.stores.kubernetes import NodeStore
from tests.support.fake_store import FakeStore
from tests.support.kube import PREFIX


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


# --- where leases are read: etcd, the Nodes of a cluster, and the fake


class Source:
    """A LeaseSource, and others who write there: subnet 10.244.N.0/24 is peer N's."""

    def __init__(self, store, key, put, spoil, delete) -> None:
        self.store, self.key, self.put, self.spoil, self.delete = store, key, put, spoil, delete
        self._waiting: list = []
        self._watching = None

    def next_change(self):
        """The next of the watch, which begins where the last list ended."""
        while not self._waiting:
            changes = next(self._watching)
            assert isinstance(changes, Changes)
            self._waiting += [change for change in changes.changes if not isinstance(change, Hints)]
        return self._waiting.pop(0)

    def read(self):
        found = self.store.read()
        self._watching, self._waiting = self.store.watch(found.revision), []
        return found


@pytest.fixture(params=["etcd", "kubernetes", "fake"])
def source(request, prefix, open_store):
    def key(number: int) -> str:
        return f"10.244.{number}.0-24"

    def value(number: int) -> bytes:
        return encode_value(lease(f"10.244.{number}.0/24", 0xC0A80100 + number, 0x0A0000000000 + number))

    if request.param == "fake":
        fake = FakeStore()
        yield Source(
            fake,
            key,
            lambda n: fake.put(key(n), value(n)),
            lambda n: fake.put(key(n), b"x"),
            lambda n: fake.delete(key(n)),
        )
    elif request.param == "etcd":
        etcd, where = request.getfixturevalue("shared_etcd"), f"{prefix}/subnets/"
        etcd.put(f"{prefix}/config", '{"Network":"10.244.0.0/16"}')
        yield Source(
            open_store(etcd.endpoint, prefix=prefix), key, lambda n: etcd.put(where + key(n), value(n)),
            lambda n: etcd.put(where + key(n), b"x"), lambda n: etcd.delete(where + key(n)),
        )  # fmt: skip
    else:
        kube = request.getfixturevalue("clean")
        store = NodeStore(KubeSettings(kubeconfig=kube.kubeconfig()), Names.of(PREFIX), "me", "/nowhere")

        def put(n: int) -> None:
            kube.peer(f"n{n}", f"10.244.{n}.0/24", f"192.168.1.{n}", f"0a:00:00:00:00:{n:02x}")

        yield Source(
            store,
            lambda n: f"n{n}",
            put,
            lambda n: kube.annotate(f"n{n}", backend_data="x"),
            lambda n: kube.delete(f"n{n}"),
        )
        store.close()


def test_what_others_wrote_is_listed(source):
    for number in (3, 4):
        source.put(number)
    found = source.read()
    assert found.revision > 0
    assert {key: (str(one.v4.subnet), one.v4.public_ip, one.v4.mac) for key, one in found.leases.items()} == {
        source.key(3): ("10.244.3.0/24", 0xC0A80103, 0x0A0000000003),
        source.key(4): ("10.244.4.0/24", 0xC0A80104, 0x0A0000000004),
    }
    assert len({one.created for one in found.leases.values()}) == 2, "no two have one age"
    assert source.read() == found


def test_a_record_nobody_can_read_is_refused_alone(source):
    source.put(3)
    source.put(9)
    source.spoil(9)
    found = source.read()
    assert found.leases.keys() == {source.key(3)}
    assert found.refused.keys() == {source.key(9)}
    assert found.refused[source.key(9)].reason


def test_the_watch_tells_what_comes_after_the_list(source):
    source.put(1)
    source.read()
    source.put(2)
    first = source.next_change()
    assert isinstance(first, Lease)
    assert (first.key, str(first.v4.subnet)) == (source.key(2), "10.244.2.0/24")
    source.delete(1)
    assert source.next_change() == Gone(source.key(1))
    source.spoil(2)
    broken = source.next_change()
    assert isinstance(broken, Refused)
    assert "JSON" in broken.reason
    source.put(7)
    assert source.next_change().key == source.key(7)


def test_a_list_after_a_watch_has_what_the_watch_told(source):
    source.read()
    source.put(2)
    told = source.next_change()
    assert source.read().leases[source.key(2)] == told


def test_a_created_record_is_told_by_the_watch(world):
    store, *_ = world
    watching = store.watch(store.read().revision)
    made = store.create(lease("10.244.7.0/24"), 100)
    assert next(watching).changes == (made,)


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
