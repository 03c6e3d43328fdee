"""Whatever happens to etcd, the Feed ends up with what etcd says: no event lost, no busy loop."""

import shutil
import signal
import subprocess
import threading
import tracemalloc

import pytest

from lease.etcd import client as etcd_client
from lease.model import Endpoint, Lease, prefix
from lease.store import Feed, Snapshot, StoreDown, StoreUnavailable, backoff_s
from tests.support.etcd import Etcd, etcd_binary
from tests.support.feed import ROOT, b64, follows, put
from tests.support.ports import free_port
from tests.support.wait import until


def test_list_then_watch(etcd, follow):
    put(etcd, 1)
    follower = follow(etcd.endpoint)
    follows(follower, etcd)
    put(etcd, 2)
    put(etcd, 1, ip=0xC0A80163)
    etcd.delete(f"{ROOT}/subnets/10.244.2.0-24")
    follows(follower, etcd)
    assert follower.count(Snapshot) == 1


def test_killed_and_changed_while_away(etcd, follow):
    put(etcd, 1)
    put(etcd, 2)
    follower = follow(etcd.endpoint)
    follows(follower, etcd)
    etcd.kill()
    until("it is told", lambda: follower.count(StoreDown))
    etcd.start()
    etcd.delete(f"{ROOT}/subnets/10.244.1.0-24")
    put(etcd, 2, ip=0xC0A80177)
    put(etcd, 3)
    follows(follower, etcd)


class Turned:
    """In place of a Feed's Event: notes how long it would wait, and ends after so many times."""

    def __init__(self, times: int) -> None:
        self.waits: list[float] = []
        self._times = times

    def is_set(self) -> bool:
        return len(self.waits) >= self._times

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return self.is_set()


class Away:
    """A store that never answers."""

    def read(self):
        raise StoreUnavailable("away")

    def watch(self, after: int):
        raise AssertionError(f"never listed, but watched after {after}")


def test_away_costs_next_to_nothing():
    """Tries while the store is away are few: back-off up to 15 s, and one event each."""
    posted: list[object] = []
    feed = Feed(Away(), posted.append)
    feed._ending = turned = Turned(12)  # type: ignore[assignment]
    feed.run()
    assert posted == [StoreDown("away")] * 12
    for number, wait in enumerate(turned.waits, 1):
        assert backoff_s(number, 0.5) <= wait <= backoff_s(number, 1.0)
    assert sum(turned.waits[-3:]) > 3 * 0.5 * 15 - 0.1


def test_frozen_is_noticed_within_15_seconds_and_survived(etcd, follow):
    put(etcd, 1)
    follower = follow(etcd.endpoint)
    follows(follower, etcd)
    etcd.freeze()
    assert etcd_client.PROBE_AFTER_S + etcd_client.PROBE_ANSWER_S < 15
    until("the silence is noticed", lambda: follower.count(StoreDown), 20)
    assert follower.view, "what was known is kept"
    etcd.thaw()
    put(etcd, 2)
    follows(follower, etcd)


def test_frozen_from_the_start(etcd, follow):
    etcd.freeze()
    follower = follow(etcd.endpoint)
    until("it is told", lambda: follower.count(StoreDown), 20)
    etcd.thaw()
    put(etcd, 2)
    follows(follower, etcd)


def test_a_watch_that_is_quiet_is_not_given_up(etcd, follow, monkeypatch):
    """It is asked for its progress, and the answer counts as life."""
    monkeypatch.setattr(etcd_client, "PROBE_AFTER_S", 0.2)
    probes: list[int] = []
    real = etcd_client.WatchStream._probe
    monkeypatch.setattr(etcd_client.WatchStream, "_probe", lambda self: probes.append(1) or real(self))
    follower = follow(etcd.endpoint)
    follows(follower, etcd)
    until("it was asked again and again", lambda: len(probes) > 8)
    assert follower.count(Snapshot) == 1
    assert follower.count(StoreDown) == 0


def test_compacted_while_away(etcd, follow):
    for n in range(1, 6):
        put(etcd, n)
    follower = follow(etcd.endpoint)
    follows(follower, etcd)
    etcd.freeze()
    until("the silence is noticed", lambda: follower.count(StoreDown), 20)
    etcd.thaw()
    etcd.delete(f"{ROOT}/subnets/10.244.3.0-24")
    put(etcd, 9)
    etcd.compact(etcd.revision())
    follows(follower, etcd)


def test_a_watch_from_a_compacted_revision_ends(etcd, open_store):
    for n in range(1, 6):
        put(etcd, n)
    etcd.compact(etcd.revision())
    with pytest.raises(StoreUnavailable, match="compacted"):
        next(open_store(etcd.endpoint).watch(1))


def test_restored_from_an_older_backup(etcd, follow, tmp_path):
    """Revisions go backwards, and pass the old ones again with other content."""
    for n in range(1, 4):
        put(etcd, n)
    etcd.kill()
    shutil.copytree(etcd.folder / "data", tmp_path / "backup")
    etcd.start()
    follower = follow(etcd.endpoint)
    for n in range(4, 12):
        put(etcd, n)
    etcd.delete(f"{ROOT}/subnets/10.244.1.0-24")
    follows(follower, etcd)
    etcd.kill()
    shutil.rmtree(etcd.folder / "data")
    shutil.move(tmp_path / "backup", etcd.folder / "data")
    etcd.start()
    for n in range(20, 40):
        put(etcd, n)
    follows(follower, etcd)
    assert "10.244.1.0-24" in follower.view
    assert "10.244.5.0-24" not in follower.view


def test_a_watch_from_the_future_ends(etcd, open_store):
    with pytest.raises(StoreUnavailable, match="restored from a backup"):
        next(open_store(etcd.endpoint).watch(10_000))


def test_some_endpoints_dead(etcd, follow):
    put(etcd, 1)
    dead = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    follower = follow(dead[0], "http://no-such-host.invalid:2379", etcd.endpoint, dead[1])
    follows(follower, etcd)


def test_one_endpoint_frozen_among_others(tmp_path, follow):
    members = cluster(tmp_path, 3)
    try:
        follower = follow(*[member.endpoint for member in members])
        put(members[0], 1)
        follows(follower, members[1])
        members[0].freeze()
        until("the others are a quorum again", lambda: put(members[1], 2) or True, 30)  # the frozen one may have led
        follows(follower, members[1], 30)
        members[0].thaw()
        # No quorum: the member that is left has no leader, and says so instead of serving a dead watch.
        members[1].kill()
        members[2].kill()
        downs = follower.count(StoreDown)
        until("the loss of the leader is noticed", lambda: follower.count(StoreDown) > downs, 30)
        members[1].start()
        until("two are a quorum", lambda: put(members[1], 3) or True, 30)
        follows(follower, members[1], 30)
    finally:
        for member in members:
            member.close()


def cluster(folder, size: int) -> list[Etcd]:
    ports = [(free_port(), free_port()) for _ in range(size)]
    names = ",".join(f"m{n}=http://127.0.0.1:{peer}" for n, (_, peer) in enumerate(ports))
    members: list[Etcd] = []

    def start(n: int) -> None:
        flags = ("--name", f"m{n}", "--initial-cluster", names)
        members.append(Etcd(folder / f"m{n}", port=ports[n][0], flags=flags, peer=ports[n][1]))

    threads = [threading.Thread(target=start, args=(n,)) for n in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(members) == size
    return sorted(members, key=lambda member: member.folder)


def test_more_records_than_one_grpc_message_used_to_hold(etcd, open_store):
    """Answers over 4 MiB, gRPC's default limit."""
    pad = b'","X":"' + b"x" * 900 + b'"}'
    batch = []
    for n in range(5000):
        base = f"10.{n >> 8}.{n & 255}.0"
        data = b'{"PublicIP":"192.168.1.2","BackendType":"udp' + pad
        batch.append((f"{base}-24", data))
    for start in range(0, len(batch), 100):
        etcd.ask(
            "/v3/kv/txn",
            {
                "success": [
                    {"request_put": {"key": b64(f"{ROOT}/subnets/{k}"), "value": b64(v)}}
                    for k, v in batch[start : start + 100]
                ]
            },
        )
    assert len(open_store(etcd.endpoint).read().leases) == 5000


def test_records_that_are_huge_cost_a_refusal_each_and_no_memory(etcd, open_store):
    """Eighty of 300 kB among good ones: pages of fewer keys, until they fit; what came is not kept."""
    for n in range(1, 41):
        put(etcd, n)
    huge = b'{"PublicIP":"192.168.1.2","X":"' + b"x" * 300_000 + b'"}'
    for n in range(80):
        etcd.put(f"{ROOT}/subnets/10.245.{n}.0-24", huge)
    put(etcd, 250)
    store = open_store(etcd.endpoint)
    before, pages = store.read(), []
    largest = etcd_client.LARGEST_PAGE
    real = etcd_client.EtcdClient.pages

    def counted(self, *arguments, **more):
        for page in real(self, *arguments, **more):
            pages.append(page.ByteSize())
            yield page

    etcd_client.EtcdClient.pages = counted
    tracemalloc.start()
    try:
        found = store.read()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        etcd_client.EtcdClient.pages = real
    assert len(found.leases) == len(before.leases) == 41
    assert len(found.refused) == 80
    assert {refused.reason for refused in found.refused.values()} == {
        "value has 300033 bytes; a record has at most 16384"
    }
    assert max(pages) <= largest
    assert 6 <= len(pages) <= 40
    assert peak < 6 * largest
    assert kept < largest / 4
    assert len(store.later_than(0)) == 41


def test_a_value_larger_than_a_page_is_refused_alone(etcd, open_store, monkeypatch):
    monkeypatch.setattr(etcd_client, "LARGEST_PAGE", 100_000)
    put(etcd, 1)
    etcd.put(f"{ROOT}/subnets/10.244.2.0-24", b"x" * 200_000)
    put(etcd, 3)
    found = open_store(etcd.endpoint).read()
    assert sorted(found.leases) == ["10.244.1.0-24", "10.244.3.0-24"]
    assert "at most 16384" in found.refused["10.244.2.0-24"].reason


def test_no_thread_or_descriptor_is_left_behind(etcd, open_store):
    import os

    store = open_store(etcd.endpoint)

    def cycle() -> None:
        watching = store.watch(store.read().revision)
        put(etcd, 1)
        next(watching)
        watching.close()

    for _ in range(3):
        cycle()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(25):
        cycle()
    until("threads end", lambda: threading.active_count() <= threads + 1)
    until("descriptors end", lambda: len(os.listdir("/proc/self/fd")) <= files + 3)


def test_reconnecting_ends_a_watch_and_the_next_call_works(etcd, open_store):
    """Our own address changed: a connection from the old one would be silent for long."""
    store = open_store(etcd.endpoint)
    watching = store.watch(store.read().revision)
    threading.Timer(0.2, store.reconnect).start()
    with pytest.raises(StoreUnavailable):
        next(watching)
    assert store.read().leases == {}


def test_a_proxy_that_answers_no_probe_is_asked_otherwise(etcd, follow, tmp_path, monkeypatch):
    """etcd's grpc-proxy: its watches are good ones, though a progress request is never answered."""
    monkeypatch.setattr(etcd_client, "PROBE_AFTER_S", 1.0)
    monkeypatch.setattr(etcd_client, "PROBE_ANSWER_S", 1.0)
    monkeypatch.setattr(etcd_client, "FIRST_ANSWER_S", 1.0)
    asked: list[int] = []
    real = etcd_client.WatchStream.__init__

    def counting(self, watch, call, where, ask) -> None:
        real(self, watch, call, where, lambda: asked.append(1) or ask())

    monkeypatch.setattr(etcd_client.WatchStream, "__init__", counting)
    port = free_port()
    proxy = subprocess.Popen(
        [etcd_binary(), "grpc-proxy", "start", f"--endpoints={etcd.endpoint}", f"--listen-addr=127.0.0.1:{port}",
         "--data-dir", str(tmp_path / "proxy")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        follower = follow(f"http://127.0.0.1:{port}")
        until("listed by the proxy", lambda: follower.count(Snapshot))
        until("it is asked otherwise", lambda: asked)
        downs, before = follower.count(StoreDown), len(asked)
        until("again and again", lambda: len(asked) >= before + 3)
        assert follower.count(StoreDown) == downs, "silence is no fault"
        put(etcd, 5)
        until("told", lambda: "10.244.5.0-24" in follower.view)
        end = Endpoint(prefix("10.244.6.0/24"), 0xC0A80106, 1, 0x0A0000000006)
        held = follower.store.create(Lease("10.244.6.0-24", "vxlan", end, None, "me", 0, 0, 0), 60)
        assert 50 < follower.store.keep_alive(held).left_s <= 60
        lists = follower.count(Snapshot)
        proxy.send_signal(signal.SIGSTOP)
        until("a frozen one is noticed", lambda: follower.count(StoreDown) > downs, 15)
        proxy.send_signal(signal.SIGCONT)
        until("and found again", lambda: follower.count(Snapshot) > lists, 30)
    finally:
        proxy.kill()
        proxy.wait()


def test_backoff_grows_and_spreads():
    assert [round(backoff_s(n, 1.0), 1) for n in (1, 2, 3, 4)] == [0.2, 0.4, 0.8, 1.6]
    assert backoff_s(50, 1.0) == 15.0
    assert backoff_s(1, 0.5) == 0.1
