"""Which subnet a node takes."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lease.config import Pool, parse_config
from lease.model import Prefix, mac_fault, prefix
from lease.records.subnets import SubnetIndex
from lease.tenure.allocate import RangeFull, choose_mac, choose_subnet


def pool(text='{"Network":"10.244.0.0/16"}') -> Pool:
    found = parse_config(text).v4
    assert found is not None
    return found


def index(*subnets: str) -> SubnetIndex:
    return SubnetIndex.of(4, [(prefix(text), text) for text in subnets])


def test_the_previous_subnet_is_kept_when_free_and_valid(rng):
    assert choose_subnet(pool(), index(), prefix("10.244.77.0/24"), rng) == prefix("10.244.77.0/24")


@pytest.mark.parametrize(
    ("previous", "taken"),
    [
        pytest.param("10.244.77.0/24", ["10.244.77.0/24"], id="taken"),
        pytest.param("10.244.77.0/24", ["10.244.77.128/25"], id="partly taken"),
        pytest.param("10.244.77.0/24", ["10.244.64.0/20"], id="inside a larger one"),
        pytest.param("10.244.0.0/24", [], id="before SubnetMin"),
        pytest.param("10.244.77.0/25", [], id="another length"),
        pytest.param("10.9.77.0/24", [], id="another network"),
    ],
)
def test_the_previous_subnet_is_left_otherwise(previous, taken, rng):
    chosen = choose_subnet(pool(), index(*taken), prefix(previous), rng)
    assert chosen != prefix(previous)
    assert pool().allows(chosen)
    assert index(*taken).free(chosen)


def test_the_last_free_one_is_found(rng):
    p = pool()
    taken = SubnetIndex.of(4, [(p.subnet(i), str(i)) for i in range(p.size) if i != 200])
    assert choose_subnet(p, taken, None, rng) == p.subnet(200)


def test_full_says_so(rng):
    p = pool()
    taken = SubnetIndex.of(4, [(p.subnet(i), str(i)) for i in range(p.size)])
    with pytest.raises(RangeFull, match="all 255 subnets"):
        choose_subnet(p, taken, None, rng)


def test_nodes_starting_together_rarely_collide():
    chosen = [
        choose_subnet(pool('{"Network":"10.0.0.0/8"}'), index(), None, random.Random(seed)) for seed in range(200)
    ]
    assert len(set(chosen)) >= 198, "drawn from all 65,535, not from the first 100"


def test_the_work_does_not_grow_with_the_leases(rng):
    """60,000 leases: a choice looks at a handful of subnets, whatever is taken (counted, not timed)."""
    p = pool('{"Network":"10.0.0.0/8"}')
    taken = SubnetIndex.of(4, [(p.subnet(i), str(i)) for i in range(60_000)])
    looks = 0
    original = taken.free

    def counted(subnet):
        nonlocal looks
        looks += 1
        return original(subnet)

    taken.free = counted
    for _ in range(100):
        choose_subnet(p, taken, None, rng)
    assert looks < 100 * 49


prefixes = st.builds(
    lambda base, length: Prefix(4, (10 << 24) | (base >> (32 - length) << (32 - length)), length),
    st.integers(0, (1 << 16) - 1),
    st.integers(20, 30),
)


@given(
    st.lists(st.tuples(prefixes, st.sampled_from("abc")), max_size=30),
    st.lists(st.tuples(prefixes, st.sampled_from("abc")), max_size=15),
    prefixes,
)
def test_the_index_says_what_a_plain_search_says(added, removed, asked):
    found = SubnetIndex(4)
    plain: set[tuple[Prefix, str]] = set()
    for item in added:
        found.add(*item)
        plain.add(item)
    for item in removed:
        found.remove(*item)
        plain.discard(item)
    assert sorted(found.overlapping(asked)) == sorted(key for subnet, key in plain if subnet.overlaps(asked))
    assert found.free(asked) == (not any(subnet.overlaps(asked) for subnet, _ in plain))


def test_macs_are_unicast_local_and_unused(rng):
    seen: set[int] = set()
    for _ in range(500):
        mac = choose_mac(seen, rng)
        assert mac not in seen
        assert mac_fault(mac) is None
        assert mac >> 41 & 1, "locally administered"
        seen.add(mac)
