"""The store away, slow or wrong."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import threading
import time

import pytest

from overlay.lab import netns, topology
from tests.support.etcd import Etcd
from tests.support.pki import authority, openssl, request
from tests.support.wait import until

AWAY_S = 15.0
HOLE = (
    "add table ip hole; add chain ip hole o { type filter hook output priority 0; };"
    " add rule ip hole o tcp dport 2379 drop"
)


def _caught_up(scene, number: int) -> bool:
    """The agent learned of a record that was written while the store was away, or since."""
    status = scene.agents[0].status()
    found = any(peer["public_ip"] == f"192.168.1.{number}" for peer in status["peers"])
    return found and not status["store_down"] and not status["differences"]


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
        seen or (lambda: scene.agents[0].status()["store_down"]),
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
            scene.world.peers("node1") == 1 and scene.agents[0].ready() and not scene.agents[0].status()["store_down"]
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
    member = etcd.ask("/v3/maintenance/status", {})["header"]["member_id"]

    def alarm(action: str) -> None:
        etcd.ask("/v3/maintenance/alarm", {"action": action, "memberID": member, "alarm": "NOSPACE"})

    def refused() -> bool:
        with pytest.raises(AssertionError, match="database space exceeded"):
            etcd.put("/elsewhere", "x")
        return True

    def recover() -> bool:
        time.sleep(40)  # longer than the lease
        alarm("DEACTIVATE")
        scene.world.put_peer(99)
        return True

    lost = scene.suffer(
        "etcd out of space for 40 s, leases of 30 s", "NOSPACE alarm", lambda: alarm("ACTIVATE"), refused, 60, recover,
        lambda: _caught_up(scene, 99) and scene.agents[0].ready(),
    )  # fmt: skip
    assert lost == 0


class SlowProxy:
    """Passes bytes on after a delay, in the underlay's namespace."""

    def __init__(self, world, port: int, delay_s: float) -> None:
        self.delay_s, self._target, self._ending = delay_s, (topology.GATEWAY, 2379), threading.Event()
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
        try:
            while data := source.recv(1 << 16):
                time.sleep(self.delay_s)
                target.sendall(data)
        except OSError:
            pass
        finally:
            for one in (source, target):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._ending.set()
        for one in self._sockets:
            one.close()


def test_slow_answers(scene):
    """Two seconds each way: it is slow, and works."""
    proxy = SlowProxy(scene.world, 2399, 0.0)
    try:
        scene.begin(f"--etcd-endpoints=http://{topology.GATEWAY}:2399")
        proxy.delay_s = 2.0
        scene.world.put_peer(99)
        lost = scene.suffer(
            "etcd answers after 4 s", "a proxy that holds each packet for 2 s each way", lambda: None, lambda: True, 60,
            whole=lambda: _caught_up(scene, 99),
        )  # fmt: skip
        assert lost == 0
        again = scene.world.restart(scene.agents[0], f"--etcd-endpoints=http://{topology.GATEWAY}:2399").wait_ready(60)
        assert again.ready()
    finally:
        proxy.close()


def _certificates(folder) -> None:
    """A CA; a server's certificate for two days, and one that ended yesterday."""

    folder.mkdir()
    authority(folder)
    request(folder, "server")
    (folder / "ca.conf").write_text(
        "[ca]\ndefault_ca=c\n[c]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\n"
        f"x509_extensions=e\nunique_subject=no\n[p]\ncommonName=supplied\n[e]\nsubjectAltName=IP:{topology.GATEWAY}\n"
    )
    (folder / "index").touch()
    (folder / "serial").write_text("01\n")
    signing = "ca -batch -config ca.conf -cert ca.crt -keyfile ca.key -in server.csr -notext"
    openssl(folder, f"{signing} -out good.crt -days 2")
    openssl(folder, f"{signing} -out expired.crt -startdate 20250101000000Z -enddate 20250102000000Z")


def test_expired_certificates(scene):
    world, folder = scene.world, scene.world.folder / "pki"
    _certificates(folder)
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
        lambda: serve("good.crt"), lambda: "expired" in scene.agents[0].status()["store_down"],
    )  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_the_api_server(kube_scene, how):
    scene = kube_scene.begin()
    kube = scene.world.kube

    def recover() -> bool:
        cpu, lines = scene.idle_cost(AWAY_S)
        assert cpu < 0.03
        assert lines < 12
        if how == signal.SIGKILL:
            kube.start()
        else:
            kube.process.send_signal(signal.SIGCONT)
        kube.peer("late", "10.244.99.0/24", "192.168.1.99", "0a:00:00:00:01:63")
        return True

    def stop() -> None:
        kube.process.send_signal(how)
        if how == signal.SIGKILL:
            kube.process.wait()

    lost = scene.suffer(
        f"API server {'killed' if how == signal.SIGKILL else 'frozen'}, 15 s after it is noticed back", how.name, stop,
        lambda: scene.agents[0].status()["store_down"], 60, recover, lambda: _caught_up(scene, 99),
    )  # fmt: skip
    assert lost == 0
    assert json.dumps(scene.agents[0].status()["problems"]) == "{}"
