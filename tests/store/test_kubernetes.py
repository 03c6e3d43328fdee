"""The Kubernetes store against a real API server with RBAC on, as the manifest's service account."""

from __future__ import annotations

import queue
import random
import subprocess
import threading
import time

import pytest

from lease.kube.client import KubeClient, KubeSettings, KubeSettingsError
from lease.model import Lease, Refused, prefix
from lease.records.annotations import Hints, Names
from lease.store import Changes, Feed, Gone, RecordChanged, Snapshot, StoreDown, StoreUnavailable
from lease.stores import kubernetes
from lease.stores.kubernetes import SINGLY, NodeStore
from tests.support.kube import PREFIX, Kube
from tests.support.wait import until

NAMES = Names.of(PREFIX)


@pytest.fixture
def stores():
    """Opens stores; feeds of them post into a queue. All are closed."""
    opened: list[NodeStore] = []
    feeds: list[Feed] = []

    class Opener:
        def __call__(self, kube: Kube, name: str = "me", kubeconfig: str = "") -> NodeStore:
            opened.append(NodeStore(KubeSettings(kubeconfig=kubeconfig or kube.kubeconfig()), NAMES, name, "/nowhere"))
            return opened[-1]

        def feed(self, store: NodeStore) -> Told:
            told = Told()
            feeds.append(Feed(store, told.post, random.Random(1)))
            feeds[-1].start()
            return told

    yield Opener()
    for feed in feeds:
        feed.stop()
    for store in opened:
        store.close()
    for feed in feeds:
        feed.join(20)
        assert not feed.is_alive()
    until("no thread is left", lambda: not any(t.name == "watch-doubts" for t in threading.enumerate()), 10)


class Told:
    """What a feed posted, made into the picture an agent has."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        self.leases: dict[str, Lease] = {}
        self.refused: dict[str, Refused] = {}
        self.lists = self.downs = self.changes = 0
        self.down = ""

    def post(self, event) -> None:
        if isinstance(event, Snapshot):
            self.leases, self.refused, self.down = dict(event.leases), dict(event.refused), ""
            self.lists += 1
        elif isinstance(event, StoreDown):
            self.downs, self.down = self.downs + 1, event.reason
        elif isinstance(event, Changes):
            for change in event.changes:
                if isinstance(change, Hints):
                    continue
                self.changes += 1
                self.leases.pop(change.key, None)
                self.refused.pop(change.key, None)
                if isinstance(change, Lease):
                    self.leases[change.key] = change
                elif isinstance(change, Refused):
                    self.refused[change.key] = change
        self.events.put(event)


def peer(kube: Kube, number: int, name: str = "") -> str:
    name = name or f"n{number}"
    kube.peer(name, f"10.244.{number}.0/24", f"192.168.1.{number}", f"0a:00:00:00:00:{number:02x}")
    return name


def test_nodes_are_leases(clean, stores):
    peer(clean, 5)
    clean.node("bare", "10.244.9.0/24")
    clean.peer("broken", "10.244.8.0/24", "nonsense", "0a:00:00:00:00:08")
    found = stores(clean).read()
    assert found.leases.keys() == {"n5"}
    lease = found.leases["n5"]
    assert lease.v4 is not None
    assert (str(lease.v4.subnet), lease.v4.public_ip, lease.v4.vni, lease.v4.mac) == (
        "10.244.5.0/24", 0xC0A80105, 1, 0x0A0000000005,
    )  # fmt: skip
    assert "nonsense" in found.refused["broken"].reason


@pytest.mark.parametrize(
    ("cidrs", "expected"),
    [
        (("10.244.3.7/24",), "10.244.3.0/24"),  # host bits
        (("fd00:10:3::/64", "10.244.3.0/24"), "10.244.3.0/24"),  # IPv6 first
        (("10.244.3.0/24", "fd00:10:3::/64"), "10.244.3.0/24"),
    ],
)
def test_every_form_of_pod_cidrs_the_api_accepts(clean, stores, cidrs, expected):
    notes = {
        "kube_subnet_manager": "true", "backend_type": "vxlan", "public_ip": "192.168.1.3",
        "backend_data": '{"VNI":1,"VtepMAC":"0a:00:00:00:00:03"}',
    }  # fmt: skip
    clean.node("odd", pod_cidrs=cidrs, **notes)
    found = stores(clean).read()
    assert found.leases["odd"].v4.subnet == prefix(expected)


def test_the_older_node_comes_first_then_the_uid(clean, stores):
    for number in range(1, 4):
        peer(clean, number)
        time.sleep(1.1 if number == 1 else 0)
    found = stores(clean).read().leases
    assert found["n1"].created < min(found["n2"].created, found["n3"].created)
    uids = {name: clean.read(name)["metadata"]["uid"] for name in ("n2", "n3")}
    stamps = {name: clean.read(name)["metadata"]["creationTimestamp"] for name in ("n2", "n3")}
    by_rule = sorted(("n2", "n3"), key=lambda name: (stamps[name], uids[name]))
    assert sorted(("n2", "n3"), key=lambda name: found[name].created) == by_rule


def test_the_watch_tells_joins_changes_and_leaves_and_no_heartbeat(clean, stores):
    peer(clean, 1)
    told = stores.feed(stores(clean))
    until("listed", lambda: "n1" in told.leases)
    peer(clean, 2)
    until("a join", lambda: "n2" in told.leases)
    clean.annotate("n2", public_ip="192.168.1.77")
    until("a new address", lambda: told.leases["n2"].v4.public_ip == 0xC0A8014D)
    before = told.changes
    for _ in range(20):
        clean.heartbeat("n1")
    clean.patch("n1", {"spec": {"unschedulable": True}})  # cordoned: no matter to us
    clean.annotate("n2", kube_subnet_manager=None)
    until("one that is nobody's any more", lambda: "n2" not in told.leases)
    assert told.changes == before + 1
    clean.delete("n1")
    until("a leave", lambda: "n1" not in told.leases)
    assert (told.lists, told.downs) == (1, 0)


def test_a_pod_cidr_that_comes_late(clean, stores):
    notes = {
        "kube_subnet_manager": "true", "backend_type": "vxlan", "public_ip": "192.168.1.3",
        "backend_data": '{"VNI":1,"VtepMAC":"0a:00:00:00:00:03"}',
    }  # fmt: skip
    clean.node("late", **notes)
    told = stores.feed(stores(clean))
    until("it is refused with its reason", lambda: "late" in told.refused)
    assert "no podCIDR yet" in told.refused["late"].reason
    clean.patch("late", {"spec": {"podCIDR": "10.244.3.0/24", "podCIDRs": ["10.244.3.0/24"]}})
    until("and taken once it has one", lambda: "late" in told.leases)


def test_many_unknown_nodes_cost_one_list_and_one_costs_one_get(clean, stores, monkeypatch):
    asked: list[str] = []
    real = KubeClient.ask

    def counted(self, path, query, *args, **more):
        asked.append(path)
        return real(self, path, query, *args, **more)

    store = stores(clean)
    store.read()
    watching = store.watch(0)
    monkeypatch.setattr(KubeClient, "ask", counted)
    peer(clean, 1)
    assert next(watching).changes[0].key == "n1"
    assert asked == ["/api/v1/nodes/n1"]
    asked.clear()
    for number in range(10, 10 + SINGLY + 5):
        peer(clean, number)
    fresh = stores(clean)
    assert len(fresh.read().leases) == SINGLY + 6
    assert set(asked) == {"/api/v1/nodes"}  # the first list is the only one that is not metadata
    for number in range(100, 100 + SINGLY + 5):
        peer(clean, number)
    asked.clear()
    assert len(fresh.read().leases) == 2 * SINGLY + 11
    assert len(asked) == 2  # metadata of all, then one list for what is unknown
    asked.clear()
    fresh.read()
    assert len(asked) == 1


def test_heartbeats_of_nodes_that_nobody_manages_cost_no_request(clean, stores, monkeypatch):
    """They have no podCIDR: a cluster that gives none, virtual nodes."""
    asked: list[str] = []
    real = KubeClient.ask

    def counted(self, path, query, *args, **more):
        asked.append(path)
        return real(self, path, query, *args, **more)

    told = stores.feed(stores(clean))
    until("listed", lambda: told.lists)
    monkeypatch.setattr(KubeClient, "ask", counted)
    for number in range(30):
        clean.node(f"bare{number}")
    for number in range(60):
        clean.heartbeat(f"bare{number % 30}")
    peer(clean, 7)
    until("the watch is past them", lambda: told.leases.keys() == {"n7"})
    assert [path for path in asked if path not in ("/api/v1/nodes/n7", "/api/v1/nodes/me")] == []
    notes = {"kube_subnet_manager": "true", "backend_type": "vxlan", "public_ip": "192.168.1.9"}
    clean.annotate("bare0", backend_data='{"VNI":1,"VtepMAC":"0a:00:00:00:00:09"}', **notes)
    until("one that is managed later is looked at", lambda: "no podCIDR yet" in told.refused["bare0"].reason)
    clean.patch("bare0", {"spec": {"podCIDR": "10.244.9.0/24", "podCIDRs": ["10.244.9.0/24"]}})
    until("and is a peer", lambda: told.leases.keys() == {"n7", "bare0"})


def test_a_node_made_again_is_told_also_while_the_watch_was_down(clean, stores):
    peer(clean, 1)
    store = stores(clean)
    before = store.read().leases["n1"]
    clean.delete("n1")
    clean.peer("n1", "10.244.33.0/24", "192.168.1.1", "0a:00:00:00:00:01")
    after = store.read().leases["n1"]
    assert after.handle != before.handle
    assert str(after.v4.subnet) == "10.244.33.0/24"
    told = stores.feed(store)
    until("listed", lambda: "n1" in told.leases)
    clean.delete("n1")
    clean.peer("n1", "10.244.44.0/24", "192.168.1.1", "0a:00:00:00:00:01")
    until("seen by the watch", lambda: "n1" in told.leases and str(told.leases["n1"].v4.subnet) == "10.244.44.0/24")


def test_a_write_is_for_one_uid_alone(clean, stores):
    clean.node("me", "10.244.2.0/24")
    clean.heartbeat("me")
    store = stores(clean)
    view = store.own()
    assert store.zone == ""
    clean.patch("me", {"metadata": {"labels": {"topology.kubernetes.io/zone": "zone-a"}}})
    view = store.own()
    assert store.zone == "zone-a"
    condition = {"type": "NetworkUnavailable", "status": "False", "reason": "x", "message": "y"}
    store.write(view.uid, {f"{PREFIX}/public-ip": "192.168.1.2"}, condition)
    assert clean.notes("me") == {"public-ip": "192.168.1.2"}
    kinds = {c["type"] for c in clean.read("me")["status"]["conditions"]}
    assert kinds == {"Ready", "NetworkUnavailable"}, "another's condition was lost"
    assert store.own().unavailable == "False"
    clean.delete("me")
    with pytest.raises(RecordChanged):
        store.write(view.uid, {f"{PREFIX}/public-ip": "192.168.1.3"}, None)
    with pytest.raises(RecordChanged, match="no Node me"):
        store.own()
    clean.node("me", "10.244.2.0/24")
    with pytest.raises(RecordChanged):
        store.write(view.uid, {f"{PREFIX}/public-ip": "192.168.1.3"}, None)
    assert clean.notes("me") == {}


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("get", "/api/v1/nodes/me", True),
        ("get", "/api/v1/pods", True),
        ("get", "/api/v1/namespaces", True),
        ("get", "/apis/networking.k8s.io/v1/networkpolicies", True),
        ("get", "/api/v1/secrets", False),
        ("patch", "/api/v1/nodes/me/status", True),
        ("patch", "/api/v1/nodes/me", False),
    ],
)
def test_the_manifests_role_gives_this_and_no_more(clean, method, path, allowed):
    clean.node("me", "10.244.2.0/24")
    client = KubeClient(KubeSettings(kubeconfig=clean.kubeconfig()))
    try:
        call = (lambda: client.get(path)) if method == "get" else (lambda: client.patch(path, {"metadata": {}}))
        if allowed:
            call()
        else:
            with pytest.raises(StoreUnavailable, match=r"403.*cannot"):
                call()
    finally:
        client.close()


def test_without_its_role_it_says_what_is_forbidden(clean, stores):
    store = stores(clean, kubeconfig=clean.kubeconfig(name="nobody.kubeconfig", token="wrong"))
    with pytest.raises(StoreUnavailable, match="401"):
        store.read()


def test_nothing_says_where_the_api_is(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(KubeSettingsError, match="--kubeconfig-file"):
        KubeClient(KubeSettings())


def test_a_missing_or_broken_kubeconfig_is_waited_for(tmp_path):
    for content in (None, "", "{", "[]", "clusters: 3"):
        path = tmp_path / "kubeconfig"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        client = KubeClient(KubeSettings(kubeconfig=str(path)))
        with pytest.raises(StoreUnavailable, match="--kubeconfig-file"):
            client.get("/version")
        client.close()


def test_a_rotated_token_is_read_again(kube, stores, tmp_path):
    kube.node("me", "10.244.2.0/24")
    path = kube.kubeconfig(name="rotated.kubeconfig", token="wrong")
    store = stores(kube, kubeconfig=path)
    told = stores.feed(store)
    until("it is refused", lambda: "401" in told.down)
    kube.kubeconfig(name="rotated.kubeconfig", token="agent-token")
    until("the new one is taken", lambda: told.lists == 1, 20)


@pytest.mark.parametrize("how", ["killed", "stopped", "frozen"])
def test_a_server_that_goes_is_noticed_and_found_again(kube, stores, how):
    peer(kube, 1)
    told = stores.feed(stores(kube))
    until("listed", lambda: told.lists == 1)
    if how == "frozen":
        kube.freeze()
    else:
        kube.stop(9 if how == "killed" else 15)
    until("it is noticed", lambda: told.down, 15)
    if how == "frozen":
        kube.thaw()
    else:
        kube.start()
    until("and listed again", lambda: told.lists >= 2 and not told.down, 40)
    assert told.downs < 20, "it tries without a pause"
    peer(kube, 2)
    until("and watched again", lambda: "n2" in told.leases)


def test_an_etcd_restored_from_a_backup(kube, stores):
    """Revisions go backwards: silence on the old watch, which only ends with the server."""
    peer(kube, 1)
    kube.stop()
    kube.etcd.kill()
    backup = kube.folder / "backup"
    subprocess.run(["cp", "-a", str(kube.etcd.folder / "data"), str(backup)], check=True)
    kube.etcd.start()
    kube.start()
    for number in range(2, 9):
        peer(kube, number)
    told = stores.feed(stores(kube))
    until("all are listed", lambda: len(told.leases) == 8)
    kube.stop()
    kube.etcd.kill()
    subprocess.run(["rm", "-rf", str(kube.etcd.folder / "data")], check=True)
    subprocess.run(["cp", "-a", str(backup), str(kube.etcd.folder / "data")], check=True)
    kube.etcd.start()
    kube.start()
    until("what the backup holds is what is", lambda: told.leases.keys() == {"n1"}, 60)
    peer(kube, 77)
    until("and the watch goes on", lambda: "n77" in told.leases)


def test_compacted_history_means_list_again(kube, stores):
    peer(kube, 1)
    store = stores(kube)
    store.read()
    store._version = "1"  # as after a long partition
    for number in range(2, 5):
        peer(kube, number)
    kube.etcd.compact(kube.etcd.revision())
    kube.stop()
    kube.start()  # an API server without the events in its cache
    with pytest.raises(StoreUnavailable, match=r"410|too old"):
        list(store.watch(0))
    assert len(store.read().leases) == 4


def test_the_server_says_the_same_in_both_forms(clean, stores, monkeypatch):
    for number in range(1, 60):  # more than a page
        peer(clean, number)
    clean.node("odd", pod_cidrs=("10.244.77.9/24", "fd00:77::/64"))
    found = [stores(clean).read()]
    for name in ("WHOLE", "METADATA", "METADATA_LIST"):
        monkeypatch.setattr(kubernetes, name, getattr(kubernetes, name).split(",")[1])
    store = stores(clean)
    found.append(store.read())
    assert len(found[0].leases) == 59
    assert found[0][1:] == found[1][1:]
    watching = store.watch(0)
    peer(clean, 1, "n60")
    assert next(watching).changes[0].key == "n60", "an old server's JSON does as well"


def test_gone_is_told_once(clean, stores):
    store = stores(clean)
    peer(clean, 1)
    store.read()
    watching = store.watch(0)
    clean.delete("n1")
    assert next(watching).changes == (Gone("n1"),)


def test_a_kubeconfig_that_names_another_server_is_read_again(kube):
    """The one before does not answer any more; nobody refuses anything."""
    path = kube.kubeconfig(name="moved.kubeconfig", port=9)
    client = KubeClient(KubeSettings(kubeconfig=path))
    with pytest.raises(StoreUnavailable):
        client.get("/version")
    assert kube.kubeconfig(name="moved.kubeconfig") == path
    with pytest.raises(StoreUnavailable):
        client.get("/version")
    assert "gitVersion" in client.get("/version")
    client.close()
