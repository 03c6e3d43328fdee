"""Each controller of the firewall and of the files that pods are made by, alone."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from lease.model import ip_number
from lease.tenure.events import Held, Lost
from overlay.cni.controller import CHECK_EVERY_S, NEW_PODS
from overlay.cni.lists import CONFLIST
from overlay.control.background import Finished, Worker
from overlay.control.controller import CannotReconcile
from overlay.control.inputs import Policed
from overlay.control.schedule import Schedule
from overlay.firewall import guard, let_in, pods_table
from overlay.firewall.controllers import LOOK_AGAIN_S
from overlay.kernel import events
from overlay.kernel.netlink import KernelError
from overlay.kernel.nftables import program
from tests.support.make import lease


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("guard", ("ip", guard.table_name(1))),
        ("pods", ("bridge", pods_table.table_name(1))),
    ],
)
def test_a_table_is_made_mended_left_and_withdrawn(bench, name, table):
    controller = getattr(bench, name)()
    bench.reconcile(controller)
    assert set(bench.kernel.tables) == {table}
    bench.kernel.tables.clear()
    assert not bench.tell(controller, events.NftSeen("somebody's"))
    assert bench.tell(controller, events.NftSeen(table[1]))
    bench.reconcile(controller)
    assert set(bench.kernel.tables) == {table}
    assert controller.counters()[f"mended_{name}"] == 1
    bench.kernel.tables["ip", "overlay-7-guard"] = bench.kernel.tables["bridge", "overlay-7-pods"] = {}
    assert len(list(controller.leave(7))) == 1, "of an earlier network"
    bench.kernel.tables.pop(("ip", "overlay-7-guard"), None)
    bench.kernel.tables.pop(("bridge", "overlay-7-pods"), None)
    assert list(controller.withdraw()) == [f"nft table {table[0]} {table[1]}"]
    assert bench.kernel.tables == {}
    bench.reconcile(controller)
    assert set(bench.kernel.tables) == {table}, "switched on again"
    bench.kernel.refuse = 1
    bench.tell(controller, events.NftSeen(""))
    with pytest.raises(OSError, match="refused"):
        bench.reconcile(controller)


def test_who_may_send_is_let_in_before_a_route_leads_there(bench):
    controller = bench.guard()
    bench.reconcile(controller)
    controller.guard.peer_changed(None, lease("10.244.9.0/24", "192.168.1.9"))
    assert controller.due() == 0.0, "at once"
    bench.reconcile(controller)
    there = bench.kernel.tables["ip", guard.table_name(1)]["vteps"]
    assert there == {ip_number("192.168.1.9", 4).to_bytes(4, "big")}


def test_after_a_change_whose_answer_was_lost_the_set_is_read(bench, monkeypatch):
    """Else the same change is sent for ever: what it takes away is gone, and the kernel refuses all of it."""
    controller, change = bench.guard(), bench.kernel.change
    monkeypatch.setattr(guard, "NetfilterSocket", lambda: bench.kernel)
    first, second = lease("10.244.8.0/24", "192.168.1.8"), lease("10.244.9.0/24", "192.168.1.9")
    controller.guard.peer_changed(None, first)
    bench.reconcile(controller)
    controller.guard.peer_changed(first, None)
    bench.clock.now += let_in.GRACE_S + 1

    def strict(table, add, take, answered=False):
        there = bench.kernel.tables[table.family, table.name]
        if any(set(keys) - there.get(name, set()) for name, keys in take.items()):
            raise KernelError(2, "no such element")
        change(table, add, take)
        if not answered:
            raise KernelError(110, "no answer")

    bench.kernel.change = strict
    with pytest.raises(OSError, match="no answer"):
        bench.reconcile(controller)
    bench.kernel.change = lambda *more: strict(*more, answered=True)
    controller.guard.peer_changed(None, second)
    bench.reconcile(controller)
    assert bench.kernel.tables["ip", guard.table_name(1)]["vteps"] == {second.first.public_ip.to_bytes(4, "big")}


@pytest.mark.parametrize("name", ["guard", "pods"])
def test_a_check_that_was_refused_is_made_again(bench, name):
    controller = getattr(bench, name)()
    bench.reconcile(controller)
    bench.clock.now = controller.due() if name == "pods" else 61.0
    bench.kernel.refuse = 1
    with pytest.raises(OSError, match="refused"):
        bench.reconcile(controller)
    bench.kernel.refuse = 0
    bench.kernel.tables.clear()
    bench.reconcile(controller)
    assert bench.kernel.tables, "it saw that the table is gone"


@pytest.mark.parametrize("name", ["nat", "forward"])
def test_what_the_nft_program_does_ends_later(bench, name, monkeypatch):
    loaded: list[Any] = []
    monkeypatch.setattr(program, "read_table", lambda _family, _name: loaded[-1] if loaded else [])
    monkeypatch.setattr(program, "load_table", lambda _family, _name, wanted: loaded.append(wanted))
    monkeypatch.setattr("overlay.firewall.forward.ensure", lambda _family, _name, _network: ([], "chain x drops"))
    controller = getattr(bench, name)()
    begun: list[Any] = []
    controller._worker.begin = begun.append
    bench.reconcile(controller)
    assert controller.unready() == f"for the {name} rules"
    work = begun.pop()
    assert not bench.tell(controller, Finished(Worker("another", bench.posted.append), None, "")), "not its own"
    assert bench.tell(controller, Finished(controller._worker, None, "no such program"))
    assert controller.unready() == "", "that is told as a problem, and keeps no pod from the node"
    with pytest.raises(CannotReconcile, match="no such program"):
        bench.reconcile(controller)
    bench.reconcile(controller)
    assert not bench.tell(controller, Finished(controller._worker, work(), ""))
    assert (controller.completed, controller.unready()) == (True, "")
    if name == "forward":
        assert bench.problems() == {"forward chain": "chain x drops"}
        bench.tell(controller, events.NftSeen("filter"))
        assert controller.due() == 2.0, "kube-proxy writes there often"
    else:
        assert bench.tell(controller, events.NftSeen("overlay-1"))
        assert loaded, "the table stands"


# --- the files pods are made by


def test_the_network_list_waits_for_the_peers_and_goes_with_the_lease(bench):
    controller = bench.cni()
    conflist = bench.folder / "cni" / CONFLIST
    bench.reconcile(controller)
    assert "FLANNEL_SUBNET=10.244.2.1/24" in (bench.folder / "subnet.env").read_text()
    assert not conflist.exists()
    bench.current.set(synced_families=frozenset({4}))
    bench.reconcile(controller)
    assert conflist.exists()
    assert bench.posted == ["cni0"]
    conflist.write_text("somebody's")
    bench.clock.now = 1.1
    assert controller.due() == 0.0
    bench.reconcile(controller)
    assert controller.counters() == {"mended_file": 1}
    bench.current.set(displaced=True, synced_families=frozenset())
    bench.reconcile(controller)
    assert not conflist.exists()
    bench.current.set(displaced=False, synced_families=frozenset({4}))
    bench.reconcile(controller)
    assert conflist.exists()
    bench.current.set(displacements=1, synced_families=frozenset())
    bench.reconcile(controller)
    assert not conflist.exists(), "lost and held again before anybody was asked: the same"
    assert not bench.current.inputs.displaced
    bench.current.set(synced_families=frozenset({4}))
    bench.reconcile(controller)
    assert sorted(controller.withdraw()) == sorted([str(conflist), str(bench.folder / "subnet.env")])


def test_no_pod_is_made_before_policies_are_in_the_kernel(bench):
    """What is written already stays, and is put back as ever: an agent that restarts keeps no pod waiting."""
    settings = bench.settings._replace(policy_dir="/somewhere")
    bench.current.set(settings=settings, synced_families=frozenset({4}))
    controller, env, conflist = bench.cni(), bench.folder / "subnet.env", bench.folder / "cni" / CONFLIST
    bench.reconcile(controller)
    assert not env.exists() and not conflist.exists()
    assert (bench.folder / "lease.json").exists(), "what a later run knows this node by"
    assert str(env) in bench.problems()[NEW_PODS]
    assert bench.health.in_place(""), "a start does not wait for it: what policies are read from may come after us"
    assert controller.due() == bench.clock.now + CHECK_EVERY_S
    bench.clock.now += CHECK_EVERY_S
    assert controller.due() == 0.0
    bench.current.set(policies_settled=True)
    bench.reconcile(controller)
    assert env.exists() and conflist.exists()
    assert bench.problems() == {}
    bench.current.set(policies_settled=False)
    env.write_text("somebody's")
    bench.reconcile(controller)
    assert "FLANNEL_SUBNET" in env.read_text()
    conflist.unlink()
    bench.current.set(settings=settings._replace(network_policy=False))
    bench.reconcile(controller)
    assert conflist.exists(), "it was written in this life"


def test_no_pod_is_made_before_pods_of_a_node_are_lifted(bench):
    """Else policies between them would not hold."""
    bench.current.set(
        policed=Policed(frozenset()), policies_settled=True, settings=bench.settings._replace(policy_dir="/x")
    )
    bench.lifts = False
    controller = bench.cni()
    bench.reconcile(controller)
    assert not (bench.folder / "subnet.env").exists()
    assert "between pods of this node" in bench.problems()[NEW_PODS]
    bench.lifts = True
    bench.reconcile(controller)
    assert (bench.folder / "subnet.env").exists()


def test_a_list_that_waits_for_nothing_is_told(bench):
    """As with another --subnet-file on Kubernetes, or an ipam.resolvConf of one's own."""
    bench.current.set(settings=bench.settings._replace(kube=True), synced_families=frozenset({4}))
    (bench.folder / "cni").mkdir(exist_ok=True)
    (bench.folder / "cni" / CONFLIST).write_text("{}")
    bench.reconcile(bench.cni())
    assert bench.problems()[NEW_PODS].startswith("made before policies")
    assert not (bench.folder / "subnet.env").exists()


def test_a_lease_lost_and_held_again_within_one_pass_brings_the_list_back(bench, monkeypatch):
    """By the scheduler, with all that have a part in it."""
    ownership, peers, cni = bench.ownership(), bench.peers(), bench.cni()
    cni.after = ()
    bench.reconcile(bench.table())
    bench.path.dumped, peers._read_whole = True, False
    monkeypatch.setattr(bench.path, "apply", lambda: False)
    schedule = Schedule([ownership, peers, cni], bench.current, bench.health, bench.clock)

    def settle() -> None:
        while schedule.run_pass():
            pass

    settle()
    conflist = bench.folder / "cni" / CONFLIST
    before, held = conflist.stat().st_mtime_ns, bench.current.inputs.own
    schedule.handle(Lost(held, "deleted"))
    schedule.handle(Held(held, "taken again"))
    assert not bench.current.inputs.synced
    settle()
    assert bench.current.inputs.synced
    assert conflist.stat().st_mtime_ns != before, "it was away"


@pytest.mark.parametrize("left", [False, True], ids=["ours", "of an earlier life"])
def test_a_list_that_cannot_be_removed_now_is_removed_later(bench, monkeypatch, left):
    controller, conflist = bench.cni(), bench.folder / "cni" / CONFLIST
    bench.current.set(synced_families=frozenset({4}))
    bench.reconcile(controller)
    controller = bench.cni() if left else controller
    bench.current.set(displaced=True, displacements=1, synced_families=frozenset())

    def refused(path: str) -> None:
        raise OSError(30, "Read-only file system", path)

    with monkeypatch.context() as away:
        away.setattr("overlay.cni.controller.remove", refused)
        for _ in range(2):
            with pytest.raises(OSError, match="Read-only"):
                bench.reconcile(controller)
    bench.reconcile(controller)
    assert not conflist.exists()


def test_a_template_that_cannot_be_used_is_told_and_all_else_written(bench):
    controller = bench.cni()
    bench.current.set(synced_families=frozenset({4}), cni_template=b"{")
    bench.reconcile(controller)
    assert "not JSON" in bench.problems()["cni"]
    assert (bench.folder / "subnet.env").exists()
    assert not (bench.folder / "cni" / CONFLIST).exists()
    bench.current.set(cni_template=None)
    bench.reconcile(controller)
    assert bench.problems() == {}


@pytest.mark.parametrize("code", [errno.EEXIST, errno.EOPNOTSUPP])
def test_a_device_comes_up_where_no_table_can_be_made(bench, monkeypatch, code):
    """No nftables on this machine: pods' traffic goes on, and the guard's own problem says what is not in force."""

    def refuse(*_):
        raise KernelError(code, "nftables")

    monkeypatch.setattr(bench.kernel, "replace", refuse)
    bench.kernel.tables.clear()
    bench.guard().shut(bench.current.inputs, "flannel.1")
    with pytest.raises(KernelError):
        bench.reconcile(bench.guard())


def test_a_sender_whose_record_comes_a_moment_later_is_no_stranger(bench, monkeypatch):
    """A node that just joined asks its peers at once."""
    monkeypatch.setattr(guard, "NetfilterSocket", lambda: bench.kernel)
    controller = bench.guard()
    bench.reconcile(controller)
    bench.kernel.tables["ip", guard.table_name(1)]["unknown_senders"] = {ip_number("192.168.1.9", 4).to_bytes(4, "big")}
    bench.clock.now += 60
    bench.reconcile(controller)
    assert "unknown senders" not in bench.problems()
    assert controller.due() <= bench.clock.now + LOOK_AGAIN_S
    bench.clock.now += LOOK_AGAIN_S
    bench.reconcile(controller)
    assert "192.168.1.9, an address that no peer's record has" in bench.problems()["unknown senders"]
    controller.guard.peer_changed(None, lease("10.244.9.0/24", "192.168.1.9"))
    bench.clock.now += LOOK_AGAIN_S
    bench.reconcile(controller)
    bench.reconcile(controller)
    assert "unknown senders" not in bench.problems()
