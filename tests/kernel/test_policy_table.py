"""A table of policies in a real kernel: made, read back, changed by its difference."""

from __future__ import annotations

import os
from contextlib import closing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lease.model import prefix
from overlay.kernel.nftables.content import Content, Elements, Form
from overlay.kernel.nftables.socket import NetfilterSocket
from overlay.lab import netns
from overlay.policy.compile import compile_node
from overlay.policy.generations import FORWARD, generation_of, unmarked
from overlay.policy.index import Index
from overlay.policy.resources import namespace_of, pod_of, policy_of
from overlay.policy.table import Maker, table
from tests.support.policy import cases, in_ipv6, pod_object, sixth
from tests.unit.test_policy_random import SUBNETS, evolving, worlds

TABLE = table(1)


@pytest.fixture
def nft(tmp_path):
    name = f"overlay-t{os.getpid()}x-nft"
    netns.create(name)
    try:
        with closing(netns.inside(name, NetfilterSocket)) as made:
            yield made
    finally:
        netns.delete(name)


def contents(node: str = "node1"):
    """Of each step of each case, in both families at once."""
    for case in cases():
        maker = Maker()
        for step in case:
            pods = []
            for pod in step.world["pods"]:
                made = pod_object(pod, pod["ip"])
                made["status"]["podIPs"].append({"ip": sixth(pod["ip"])})
                pods.append(pod_of(made))
            labels = {
                name: namespace_of({"metadata": {"name": name, "labels": given}})
                for name, given in step.world["namespaces"].items()
            }
            policies = [policy_of(each) for each in step.policies]
            policies += [p._replace(name=f"{p.name}-6") for p in (policy_of(in_ipv6(each)) for each in step.policies)]
            subnets = (prefix("192.168.0.0/16"), prefix("fd00::/64"))
            yield step.name, maker.content(compile_node(Index(pods, labels), policies, node), subnets, 7)


def test_each_is_read_back_as_it_was_made_and_changed_by_its_difference(nft):
    there = None
    for name, wanted in contents():
        nft.change_content(TABLE, there, wanted)
        found = nft.read_content(TABLE, wanted)
        assert found is not None
        for kind in ("sets", "chains"):
            was, now = getattr(wanted, kind), getattr(found, kind)
            assert now.keys() == was.keys(), name
            for each in was:
                assert now[each] == was[each], (name, each)
        assert not nft.change_content(TABLE, found, wanted), "nothing is written twice"
        assert generation_of(found, 0) == 7
        assert generation_of(nft.read_content(TABLE, Content()), 0) == 7, "whatever was expected"
        there = found
    nft.change_content(TABLE, there, Content())
    assert nft.read_content(TABLE, Content()) == Content()


def test_who_finds_it_between_a_change_and_its_generation_knows(nft):
    """An agent that was killed there: the one after it raises the generation."""
    _, wanted = next(contents())
    between = wanted._replace(chains={**wanted.chains, FORWARD: unmarked()})
    nft.change_content(TABLE, None, between)
    assert generation_of(nft.read_content(TABLE, wanted), 0) == 0
    assert generation_of(nft.read_content(TABLE, between), 0) == 0
    nft.change_content(TABLE, nft.read_content(TABLE, wanted), wanted)
    assert generation_of(nft.read_content(TABLE, between), 0) == 7


def test_a_table_of_another_form_is_made_anew(nft):
    _, wanted = next(contents())
    nft.change_content(TABLE, None, Content({"self4": Elements(Form(7, 4))}))
    found = nft.read_content(TABLE, wanted)
    with pytest.raises(ValueError, match="self4"):
        nft.change_content(TABLE, found, wanted)
    nft.replace_content(TABLE, wanted)
    assert nft.read_content(TABLE, wanted) == wanted


@given(worlds(), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_changes_end_in_what_is_compiled_anew(nft, world, data):
    """Pods, namespaces, policies of every kind, groups and contracts, by chance; read back from the kernel after each."""
    nft.remove(TABLE.family, TABLE.name)
    maker, there = Maker(), None
    for compiled, fresh in evolving(world, data):
        content = maker.content(compiled, SUBNETS, 7)
        nft.change_content(TABLE, there, content)
        there = content
        anew = Maker().content(fresh, SUBNETS, 7)
        assert nft.read_content(TABLE, anew) == anew
