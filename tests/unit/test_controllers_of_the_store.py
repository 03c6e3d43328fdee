"""Each controller of the store's side alone: records, network config, lease, an operator's files."""

from __future__ import annotations

from typing import Any

import pytest

from lease.config import parse_config
from lease.model import Refused, ip_number
from lease.records.annotations import Hints
from lease.records.packed import Leases
from lease.store import Changes, ConfigText, Gone, Snapshot, StoreDown
from lease.tenure.events import Denied, Disputed, Held, Lost, Renewed
from overlay.cluster.records import STALE_S
from overlay.control.controller import CannotReconcile
from overlay.control.schedule import Schedule
from overlay.process.watched import FileText
from tests.support.bench import CONFIG, OTHER_MTU
from tests.support.make import lease


def snapshot(*leases: Any, config: str | None = CONFIG, refused: dict[str, Refused] | None = None) -> Snapshot:
    return Snapshot(1, config.encode() if config else None, Leases.of(leases), refused or {})


def test_a_list_that_is_older_than_it_should_be_ends_readiness(bench):
    """The store answers nothing that could be used, or nothing at all; a short while of that is no news."""
    controller = bench.records()
    assert controller.due() is None
    bench.tell(controller, StoreDown("a message of 298853315 bytes"))
    assert (bench.problems(), controller.due()) == ({}, bench.clock.now + STALE_S)
    bench.clock.now += STALE_S - 1
    bench.tell(controller, StoreDown("too many"))
    bench.reconcile(controller)
    assert bench.problems() == {}
    bench.clock.now += 1
    bench.reconcile(controller)
    assert bench.problems() == {"store": "no list for 2 minutes, so that who joins or leaves is not seen: too many"}
    assert not bench.health.problems()["store"].harmless
    assert controller.due() is None
    bench.tell(controller, StoreDown("away"))
    assert bench.problems()["store"].endswith("seen: away")
    bench.tell(controller, snapshot(bench.current.inputs.own))
    assert (bench.problems(), controller.due()) == ({}, None)


def test_records_are_sorted_into_ours_peers_and_what_cannot_be_read(bench):
    controller = bench.records()
    bench.current.set(config=None, listed=False)
    assert controller.unready() == "for the first list from the store"
    bench.tell(controller, StoreDown("away"))
    assert bench.problems()["store"] == "away"
    assert controller.unready() == "for the first list from the store", "why is said once"
    own, peer = bench.current.inputs.own, lease("10.244.9.0/24", "192.168.1.9")
    bench.tell(controller, snapshot(own, peer, refused={"x": Refused("x", "bad", 0)}))
    assert bench.current.inputs.config == parse_config(CONFIG)
    assert bench.path.has_unplanned()
    status = controller.status()
    assert status["unreadable_records"] == {"x": "bad"}
    assert status["store"] == {"type": "etcd", "address": "etcd there", "up": True, "error": "", "contact_age_s": 0}
    bench.clock.now += 7
    assert controller.status()["store"]["contact_age_s"] == 7
    bench.tell(controller, Renewed(None))
    assert controller.status()["store"]["contact_age_s"] == 0, "a renewal is word of the store, too"
    bench.reconcile(bench.table())
    assert [one.key for one in bench.path.table.accepted()] == [peer.key]
    changes = (Gone("x"), Refused(peer.key, "JSON", 2), ConfigText(None))
    assert bench.tell(controller, Changes(2, changes)), "it is to be asked"
    bench.reconcile(controller)
    assert controller.status()["unreadable_records"] == {peer.key: "JSON"}
    assert list(bench.path.table.accepted()) == []
    assert "no network config" in bench.problems()["config"]
    assert bench.claims.rechecks == 0
    bench.tell(controller, Changes(3, (Gone(own.key),)))
    assert bench.claims.rechecks == 1, "our own record is the tenure's to put back"


def test_a_refused_record_that_is_deleted_is_told_as_gone(bench, capsys):
    controller = bench.records()
    own = bench.current.inputs.own
    bad = lease("10.244.9.0/24", "192.168.1.2")  # our own public IP
    bench.tell(controller, snapshot(own, bad))
    bench.reconcile(bench.table())
    assert bench.path.refused_of(bad.key)
    bench.tell(controller, Changes(2, (Gone(bad.key),)))
    bench.reconcile(controller)
    assert bench.path.refusals._reported == {}


def test_what_an_operator_wrote_on_our_node_is_an_input(bench):
    controller = bench.records()
    bench.tell(controller, Changes(2, (Hints(public_ip={4: ip_number("192.168.1.5", 4)}, faults=("no address",)),)))
    assert bench.current.inputs.settings.public_ip == ip_number("192.168.1.5", 4)
    assert bench.problems()["annotations"] == "no address"
    bench.tell(controller, Changes(3, (Hints(),)))
    assert bench.current.inputs.settings.public_ip == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no network config at the store; waiting for it; the running config is kept"),
        ("{", "the store: not JSON"),
        ('{"Network":"10.99.0.0/16","Backend":{"Type":"vxlan"}}', "does not contain our subnet 10.244.2.0/24"),
        (
            '{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}',
            "first family is IPv6, the running one's IPv4",
        ),
    ],
)
def test_a_network_config_that_cannot_be_used_is_told_and_the_running_one_kept(bench, text, words):
    before = bench.current.inputs.config
    bench.network.read(text.encode() if text else None)
    assert words in bench.problems()["config"]
    assert bench.current.inputs.config == before
    bench.network.read(CONFIG.encode())
    assert bench.problems() == {}


@pytest.mark.parametrize("lost", [False, True], ids=["another lease", "none any more"])
def test_a_refused_network_config_is_judged_again_by_another_lease(bench, lost):
    """A drained node whose Node is made again in another network: nobody writes the config a second time."""
    live, other = bench.live(), '{"Network":"10.99.0.0/16","Backend":{"Type":"vxlan"}}'
    bench.network.read(other.encode())
    bench.reconcile(live)
    assert "does not contain our subnet" in bench.problems()["config"]
    bench.current.set(displaced=True)
    bench.reconcile(live)
    assert "does not contain our subnet" in bench.problems()["config"], (
        "it was not renewed in time, and may be ours yet"
    )
    if lost:
        bench.current.set(lost=True)
    else:
        bench.current.set(own=lease("10.99.2.0/24", "192.168.1.2")._replace(created=0, modified=0))
    bench.reconcile(live)
    assert (bench.problems(), str(bench.current.inputs.config.pool(4).network)) == ({}, "10.99.0.0/16")


def test_refused_live_settings_are_judged_again_by_another_lease(bench):
    live = bench.live()
    bench.tell(live, FileText("live-settings", "/l", b'{"ip-masq": true, "underlay-cidr": ["10.244.2.0/23"]}'))
    bench.reconcile(live)
    assert "touches our subnet 10.244.2.0/24" in bench.problems()["live-settings"]
    bench.current.set(own=lease("10.244.9.0/24", "192.168.1.2")._replace(created=0, modified=0))
    bench.reconcile(live)
    assert (bench.problems(), bench.current.inputs.settings.ip_masq) == ({}, True)


def test_a_claim_that_can_be_made_again_is_no_problem_though_nobody_answers_it(bench):
    """The tenure says nothing of one that is as before."""
    controller = bench.ownership()
    schedule = Schedule([controller], bench.current, bench.health, bench.clock)
    schedule.handle(Held(bench.current.inputs.own, "allocated"))
    schedule.run_pass()
    existing, controller._existing_macs = controller._existing_macs, {4: refuse}
    controller._earlier.clear()
    bench.current.set(**OTHER_MTU)
    schedule.run_pass()
    assert "another agent keeps flannel.1" in bench.problems()["lease"]
    controller._existing_macs = existing
    bench.clock.now += 10
    schedule.run_pass()
    assert bench.problems() == {}
    controller._earlier.clear()
    controller._existing_macs = {4: refuse}
    bench.tell(controller, Denied("no subnet is free"))
    bench.current.set(underlays={4: bench.current.inputs.underlays[4]._replace(mtu=1300)})
    schedule.run_pass()
    controller._existing_macs = existing
    bench.clock.now += 10
    schedule.run_pass()
    assert bench.problems()["lease"] == "no subnet is free", "what the tenure said stands"


def refuse(_config: Any) -> int | None:
    raise CannotReconcile("another agent keeps flannel.1")


def test_the_lease_is_claimed_held_lost_and_renewed(bench):
    controller = bench.ownership()
    own = bench.current.inputs.own._replace(created=3, modified=4, handle=5)
    bench.current.set(own=None)
    bench.reconcile(controller)
    claim, _ = bench.claims.claims[-1]
    assert (claim.public_ip, claim.identity.name) == (ip_number("192.168.1.2", 4), "node1")
    assert controller.unready() == "for a lease"
    bench.tell(controller, Denied("no subnet is free"))
    assert bench.problems()["lease"] == "no subnet is free"
    bench.tell(controller, Held(own, "allocated"))
    assert bench.current.inputs.own == own._replace(created=0, modified=0, handle=0)
    assert (controller.unready(), bench.problems()) == ("", {})
    bench.tell(controller, Renewed(30.0))
    assert controller.status()["lease"]["left_s"] == 30
    bench.clock.now = 31.0
    controller.judge_renewal()
    assert "not renewed in time" in bench.problems()["renewal"]
    assert bench.current.inputs.displaced, "no new pod gets an address of it"
    displacements = bench.current.inputs.displacements
    controller.judge_renewal()
    assert bench.current.inputs.displacements == displacements, "that is said once"
    bench.tell(controller, Renewed(None))
    assert (bench.problems(), bench.current.inputs.displaced) == ({}, False)
    asked = len(bench.claims.claims)
    bench.tell(controller, Renewed(30.0))
    controller.record_seen(own._replace(handle=0))
    assert bench.claims.rechecks == 1, "the etcd lease under it is another"
    assert len(bench.claims.claims) == asked
    bench.current.set(synced_families=frozenset({4}))
    bench.tell(controller, Lost(own, "an older record"))
    assert (bench.current.inputs.displaced, bench.current.inputs.synced) == (True, False)
    assert "we lost 10.244.2.0/24" in bench.problems()["lease"]


def test_a_lost_lease_is_told_until_there_is_another(bench):
    """Whatever is claimed meanwhile: a claim is no lease."""
    controller = bench.ownership()
    schedule = Schedule([controller], bench.current, bench.health, bench.clock)
    own = bench.current.inputs.own
    schedule.handle(Held(own, "allocated"))
    schedule.run_pass()
    schedule.handle(Lost(own, "an older record"))
    bench.current.set(**OTHER_MTU)
    schedule.run_pass()
    assert len(bench.claims.claims) == 2
    assert "we lost 10.244.2.0/24" in bench.problems()["lease"]
    schedule.handle(Held(own, "taken again"))
    assert bench.problems() == {}


def test_a_dispute_is_told_once_and_is_over_when_a_settling_does_not_tell_it_again(bench):
    controller = bench.ownership()
    bench.tell(controller, Disputed("10.244.9.0-24 follows us"))
    since = bench.health.problems()["disputed record"].since
    for _ in range(3):
        bench.clock.now = controller.due()
        bench.reconcile(controller)
        assert "disputed record" in bench.problems(), "until it is known"
        bench.tell(controller, Disputed("10.244.9.0-24 follows us"))
        bench.tell(controller, Renewed(None))
    assert bench.health.problems()["disputed record"].since == since
    bench.clock.now = controller.due()
    bench.reconcile(controller)
    bench.tell(controller, Renewed(None))
    assert bench.problems() == {}


def test_a_conflict_about_our_address_ends_the_agent_before_it_holds_anything(bench):
    controller = bench.ownership()
    for _ in range(2):
        bench.tell(controller, Denied("192.168.1.2 is another node's", conflict=True))
    assert bench.stopped == ["192.168.1.2 is another node's"]


def test_rivals_are_looked_at_where_they_are_older(bench):
    controller = bench.ownership()
    controller.held = bench.current.inputs.own._replace(created=10)
    younger, older = (lease("10.244.2.0/24", "192.168.1.9", created=created) for created in (11, 9))
    controller.check_rival(younger)
    assert bench.claims.rechecks == 0
    controller.check_rival(older)
    assert bench.claims.rechecks == 1


def test_files_of_an_operator_change_the_inputs_or_are_told(bench):
    controller = bench.live()
    bench.tell(controller, FileText("cni-conf", "/c", b"{}"))
    assert bench.current.inputs.cni_template == b"{}"
    bench.tell(controller, FileText("live-settings", "/l", b'{"ip-masq": true, "log-level": "debug"}'))
    assert bench.current.inputs.settings.ip_masq
    assert bench.posted == ["debug"]
    bench.tell(controller, FileText("live-settings", "/l", b'{"iface": "eth1"}'))
    assert "needs a restart" in bench.problems()["live-settings"]
    assert bench.current.inputs.settings.ip_masq, "what ran is kept"
    bench.tell(controller, FileText("cni-conf", "/c", None))
    assert bench.problems()["file cni-conf"] == "/c is gone; its last content is kept"
    assert bench.current.inputs.cni_template == b"{}"
