"""The store away, slow or wrong."""

from __future__ import annotations

import contextlib
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlay.lab import netns, topology
from tests.support.etcd import Etcd
from tests.support.pki import EXPIRED, authority, request, signed
from tests.support.wait import until

AWAY_S = 15.0
PROXY_PORT = 2399
SLOW_S = {"etcd": 2.0, "API server": 1.5}
"""Held for so long each way: below the time within which a probe must be answered (9 s and 5 s) by what a busy machine takes."""
HOLE = (
    "add table ip hole; add chain ip hole o { type filter hook output priority 0; };"
    " add rule ip hole o tcp dport { 2379, 6443 } drop"
)


def _caught_up(scene, number: int) -> bool:
    """The agent learned of a record that was written while the store was away, or since."""
    status = scene.agents[0].status()
    found = any(peer["public_ip"] == f"192.168.1.{number}" for peer in status["peers"])
    return found and status["store"]["up"] and not status["differences"]


def _away(scene, fault, how, stop, start, seen=None):
    """The store goes for a while; meanwhile the agent costs next to nothing; then it learns what it missed."""
    cost: list[tuple[float, int]] = []

    def recover() -> bool:
        cost.append(scene.idle_cost(AWAY_S))
        start()
        scene.world.put_peer(99)
        return True

    lost = scene.suffer(
        fault,
        how,
        stop,
        seen or (lambda: scene.agents[0].status()["store"]["error"]),
        60,
        recover,
        lambda: _caught_up(scene, 99),
    )
    assert lost == 0
    cpu, lines = cost[0]
    assert cpu < 0.03, "idle while the store is away"
    assert lines < 12, "and quiet"


def test_etcd_killed(scene):
    scene.begin()
    _away(scene, "etcd killed for 15 s", "SIGKILL", scene.world.etcd.kill, scene.world.etcd.start)


def test_etcd_frozen(scene):
    scene.begin()
    _away(
        scene,
        "etcd frozen",
        "SIGSTOP, 15 s after it is noticed SIGCONT",
        scene.world.etcd.freeze,
        scene.world.etcd.thaw,
    )


def test_a_black_hole(scene):
    scene.begin()
    _away(
        scene, "a black hole on the way to etcd", "nft drops what goes to it",
        lambda: scene.world.run("node1", "nft", HOLE),
        lambda: scene.world.run("node1", "nft", "delete table ip hole"),
    )  # fmt: skip


def test_compacted_while_cut_off(scene):
    scene.begin()

    def meanwhile() -> None:
        scene.world.put_peer(98)
        revision = [scene.world.etcd.put("/elsewhere", str(n)) for n in range(50)][-1]
        scene.world.drop_record("10.244.98.0-24")
        scene.world.etcd.compact(revision + 1)
        scene.world.run("node1", "nft", "delete table ip hole")

    _away(
        scene, "history compacted while the node was cut off", "nft drop; records put and deleted; compaction",
        lambda: scene.world.run("node1", "nft", HOLE), meanwhile,
    )  # fmt: skip
    assert all(peer["public_ip"] != "192.168.1.98" for peer in scene.agents[0].status()["peers"])


def test_restored_from_an_older_backup(scene):
    """Revisions go backwards; our own record and the peer's stand in the backup, a later one does not."""
    scene.begin()
    data, backup = scene.world.etcd.folder / "data", scene.world.folder / "backup"
    scene.world.etcd.kill()
    shutil.copytree(data, backup)
    scene.world.etcd.start()
    scene.world.put_peer(97)
    until("a later peer", lambda: scene.world.peers("node1") == 2)

    def restore() -> None:
        scene.world.etcd.kill()
        shutil.rmtree(data)
        shutil.copytree(backup, data)
        scene.world.etcd.start()

    def whole() -> bool:
        return (
            scene.world.peers("node1") == 1
            and scene.agents[0].ready()
            and not scene.agents[0].status()["store"]["error"]
        )

    # the record that is gone with the restore is no loss of ours: its route must go, the peer's must stay
    lost = scene.suffer(
        "etcd restored from an older backup", "killed, its data replaced by a copy of before, started", restore,
        lambda: scene.world.peers("node1") == 1, whole=whole,
    )  # fmt: skip
    assert lost == 0


def test_nospace(scene):
    """Reads go on, writes are refused (the control): what needs none works, and the lease outlives it."""
    scene.begin("--subnet-lease-ttl=30")
    etcd = scene.world.etcd

    def refused() -> bool:
        with pytest.raises(AssertionError, match="database space exceeded"):
            etcd.put("/elsewhere", "x")
        return True

    def recover() -> bool:
        time.sleep(40)  # longer than the lease
        etcd.no_space("DEACTIVATE")
        scene.world.put_peer(99)
        return True

    lost = scene.suffer(
        "etcd out of space for 40 s, leases of 30 s", "NOSPACE alarm", lambda: etcd.no_space("ACTIVATE"), refused, 60, recover,
        lambda: _caught_up(scene, 99) and scene.agents[0].ready(),
    )  # fmt: skip
    assert lost == 0


class SlowProxy:
    """Passes bytes on after a delay, in the underlay's namespace."""

    def __init__(self, world, port: int, target: int) -> None:
        self.delay_s, self._target, self._ending = 0.0, (topology.GATEWAY, target), threading.Event()
        self._where = topology.underlay_name(world.lab)
        self._listening = netns.inside(self._where, lambda: socket.create_server((topology.GATEWAY, port)))
        self._listening.settimeout(0.2)
        self._sockets = [self._listening]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._ending.is_set():
            try:
                client, _ = self._listening.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            server = netns.inside(self._where, lambda: socket.create_connection(self._target))
            self._sockets += [client, server]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        held: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._pass_on, args=(held, target), daemon=True).start()
        data = b"x"
        while data:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            held.put((time.monotonic() + self.delay_s, data))

    def _pass_on(self, held: queue.SimpleQueue[tuple[float, bytes]], target: socket.socket) -> None:
        """Each a while after it came, but not one after the other."""
        data = b"x"
        with contextlib.suppress(OSError):
            while data:
                at, data = held.get()
                time.sleep(max(0.0, at - time.monotonic()))
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._ending.set()
        for one in self._sockets:
            one.close()


@contextlib.contextmanager
def _proxied(scene, target: int) -> Iterator[SlowProxy]:
    proxy = SlowProxy(scene.world, PROXY_PORT, target)
    try:
        yield proxy
    finally:
        proxy.close()


def _slow(scene, store: str, proxy: SlowProxy, flags: str) -> None:
    """It is slow, and works; a start does, too."""
    scene.begin(flags)
    slow_s = SLOW_S[store]
    proxy.delay_s = slow_s
    time.sleep(25)  # it is silent for longer than a watch may be
    assert not scene.agents[0].status()["store"]["error"], "slow is not away"

    def bites() -> bool:
        time.sleep(slow_s / 2)
        return not _caught_up(scene, 99)

    lost = scene.suffer(
        f"{store} answers after {2 * slow_s:.0f} s, to a record that is put then",
        f"a proxy that holds each packet for {slow_s:g} s each way",
        lambda: scene.world.put_peer(99), bites, 60, whole=lambda: _caught_up(scene, 99),
    )  # fmt: skip
    assert lost == 0
    again = scene.world.restart(scene.agents[0], flags).wait_ready(60)
    assert again.ready()


def test_slow_answers(scene):
    with _proxied(scene, 2379) as proxy:
        _slow(scene, "etcd", proxy, f"--etcd-endpoints=http://{topology.GATEWAY}:{PROXY_PORT}")


def test_slow_answers_of_the_api_server(kube_scene):
    kube = kube_scene.world.kube
    with _proxied(kube_scene, kube.port) as proxy:
        _slow(kube_scene, "API server", proxy, f"--kubeconfig-file={kube.kubeconfig(name='slow', port=PROXY_PORT)}")


def test_expired_certificates(scene):
    world, folder = scene.world, scene.world.folder / "pki"
    folder.mkdir()
    authority(folder)
    request(folder, "server")
    signed(folder, "server", "good.crt", topology.GATEWAY, "-days 2")
    signed(folder, "server", "expired.crt", topology.GATEWAY, EXPIRED)
    shutil.copy(folder / "good.crt", folder / "server.crt")
    world.etcd.close()
    urls = f"https://{topology.GATEWAY}:2379,http://{topology.GATEWAY}:2388"
    world.etcd = Etcd(
        world.folder / "tls", host=topology.GATEWAY, port=2388, namespace=topology.underlay_name(world.lab),
        flags=(f"--listen-client-urls={urls}", f"--cert-file={folder}/server.crt", f"--key-file={folder}/server.key"),
    )  # fmt: skip
    world.config()
    scene.begin(f"--etcd-endpoints=https://{topology.GATEWAY}:2379", f"--etcd-cafile={folder}/ca.crt")

    def serve(name: str) -> None:
        world.etcd.kill()
        shutil.copy(folder / name, folder / "server.crt")
        world.etcd.start()

    _away(
        scene, "etcd with an expired certificate", "started again with one that ended long ago", lambda: serve("expired.crt"),
        lambda: serve("good.crt"), lambda: "expired" in scene.agents[0].status()["store"]["error"],
    )  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_the_api_server(kube_scene, how):
    kube = kube_scene.begin().world.kube
    killed = how == signal.SIGKILL
    _away(
        kube_scene, f"API server {'killed' if killed else 'frozen'}", f"{how.name}, back 15 s after it is noticed",
        kube.stop if killed else kube.freeze, kube.start if killed else kube.thaw,
    )  # fmt: skip
    until("all is well again", lambda: kube_scene.agents[0].problems() == {})


def test_a_black_hole_before_the_api_server(kube_scene):
    world = kube_scene.begin().world
    _away(
        kube_scene, "a black hole on the way to the API server", "nft drops what goes to it",
        lambda: world.run("node1", "nft", HOLE), lambda: world.run("node1", "nft", "delete table ip hole"),
    )  # fmt: skip


def test_an_api_server_with_an_expired_certificate(kube_scene):
    """Of the same authority as the good one."""
    kube = kube_scene.begin().world.kube
    request(kube.folder, "late")
    signed(kube.folder, "late", "late.crt", topology.GATEWAY, EXPIRED, ca="tls")

    def worse() -> None:
        kube.stop()
        kube.launch("late")

    def better() -> None:
        kube.stop()
        kube.start()

    _away(
        kube_scene, "API server with an expired certificate", "started again with one that ended long ago", worse, better,
        lambda: "expired" in kube_scene.agents[0].status()["store"]["error"],
    )  # fmt: skip


def test_an_api_server_that_only_reads(kube_scene):
    """Its etcd is out of space. All goes on, and an agent that starts meanwhile finds its Node as it should be."""
    world = kube_scene.begin().world
    kube = world.kube

    def refused() -> bool:
        with pytest.raises(AssertionError, match="database space exceeded"):
            kube.annotate("node2", anything="x")
        return True

    def better() -> None:
        kube_scene.agents[0] = world.restart(kube_scene.agents[0]).wait_ready()
        kube.etcd.no_space("DEACTIVATE")

    _away(
        kube_scene, "API server read-only for 15 s, then the agent is started again", "NOSPACE alarm of its etcd",
        lambda: kube.etcd.no_space("ACTIVATE"), better, refused,
    )  # fmt: skip
    assert kube_scene.agents[0].problems() == {}


def test_an_api_server_whose_history_is_compacted(kube_scene):
    """The node is cut off meanwhile; and the server starts again, so that its cache does not remember either."""
    world = kube_scene.begin().world
    kube = world.kube

    def meanwhile() -> None:
        world.put_peer(98)
        for _ in range(20):
            kube.heartbeat("node2")
        kube.delete("peer98")
        kube.etcd.compact(kube.etcd.revision())
        kube.stop()
        kube.start()
        world.run("node1", "nft", "delete table ip hole")

    _away(
        kube_scene, "API server's history compacted while the node was cut off", "nft drop; a Node made and deleted; compaction",
        lambda: world.run("node1", "nft", HOLE), meanwhile,
    )  # fmt: skip
    assert all(peer["public_ip"] != "192.168.1.98" for peer in kube_scene.agents[0].status()["peers"])


def test_an_api_server_whose_etcd_is_restored_from_an_older_backup(kube_scene):
    """Revisions go backwards, and a Node that came later is gone."""
    world = kube_scene.begin().world
    kube = world.kube
    data, backup = kube.etcd.folder / "data", world.folder / "backup"

    def exchange(first: Path, second: Path, wipe: bool) -> None:
        kube.stop()
        kube.etcd.kill()
        if wipe:
            shutil.rmtree(second)
        shutil.copytree(first, second)
        kube.etcd.start()
        kube.start()

    exchange(data, backup, False)
    until("they are back", lambda: not any(agent.status()["store"]["error"] for agent in kube_scene.agents), 60)
    world.put_peer(97)
    until("a later peer", lambda: world.peers("node1") == 2)
    lost = kube_scene.suffer(
        "API server's etcd restored from an older backup", "both killed, its data replaced by a copy of before, started",
        lambda: exchange(backup, data, True), lambda: world.peers("node1") == 1,
        whole=lambda: world.peers("node1") == 1 and kube_scene.agents[0].ready()
        and not kube_scene.agents[0].status()["store"]["error"],
    )  # fmt: skip
    assert lost == 0
