"""Pods in columns: what comes out is what went in, whatever came and went before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overlay.policy.columns import Columns
from overlay.policy.index import Index
from overlay.policy.model import ContainerPort, Pod

V4, V6 = [bytes([10, 244, 0, n]) for n in range(4)], [bytes(15) + bytes([n]) for n in range(4)]
"""Zeros among them, which say "none" in a column."""
ADDRESSES = st.lists(st.sampled_from([*V4, *V6]), max_size=3, unique=True).map(
    lambda those: tuple(sorted(those, key=lambda each: (len(each), each)))
)
LABELS = st.dictionaries(st.sampled_from("ab"), st.sampled_from("xy"))
PORTS = st.lists(
    st.builds(ContainerPort, st.sampled_from(["http", "dns"]), st.sampled_from([6, 17]), st.integers(1, 3)), max_size=2
).map(tuple)
PODS = st.builds(
    lambda key, node, labels, addresses, ports, alone, owner: Pod(
        key, key.partition("/")[0], node, labels, addresses, ports, alone, owner
    ),
    st.sampled_from(["x/a", "x/b", "y/a", "y/b", "y/c"]), st.sampled_from(["node1", "node2"]), LABELS, ADDRESSES, PORTS,
    st.booleans(), st.sampled_from(["", "deployment/web"]),
)  # fmt: skip


@given(
    st.lists(PODS, max_size=4, unique_by=lambda pod: pod.key),
    st.lists(st.one_of(PODS, st.sampled_from(["x/a", "y/b"]))),
)
def test_what_comes_out_is_what_went_in(first, changes):
    index, plain = Index(first), {pod.key: pod for pod in first}
    for change in changes:
        if isinstance(change, Pod):
            assert index.put(change) == plain.get(change.key)
            plain[change.key] = change
        else:
            assert index.remove(change) == plain.pop(change, None)
        meant = [pod for pod in plain.values() if not pod.alone]
        assert {pod.key: pod for pod in index} == plain
        assert len(index) == len(plain)
        assert all(index.get(key) == pod for key, pod in plain.items())
        assert sorted(index.members(index.selected(())), key=str) == sorted(meant, key=str)
        for address in (*V4, *V6):
            assert index.holders(address) == sum(address in pod.addresses for pod in meant)
        for name in ("http", "dns"):
            having = index.named_ports().get((name, 6), {})
            found = sorted((index.addresses(place), number) for number, places in having.items() for place in places)
            assert found == sorted(
                (pod.addresses, port.number)
                for pod in meant
                for port in pod.ports
                if (port.name, port.protocol) == (name, 6)
            )
        for key in "ab":
            assert set(index.values_of(key)) == {pod.labels[key] for pod in meant if key in pod.labels}


def test_what_pods_have_in_common_goes_with_the_last_of_them():
    columns, labels = Columns(), {"app": "web"}
    for place in range(3):
        columns.put(place, Pod(f"x/{place}", "x", "node1", labels, (V4[1],), owner="deployment/web"))
    assert len(columns._commons.values) == 1
    for place in range(3):
        columns.take_out(place)
    assert columns._commons.values == [None]
    columns.put(0, Pod("x/new", "x", "node2", {"app": "db"}, ()))
    assert len(columns._commons.values) == 1, "its room is the next one's"
    assert columns.pod(0) == Pod("x/new", "x", "node2", {"app": "db"}, ())


def test_an_address_is_found_in_its_own_column_alone():
    """The bytes of two neighbours' addresses may have it between them."""
    index = Index(
        Pod(f"x/{number}", "x", "node1", {}, (address,))
        for number, address in enumerate([bytes([10, 244, 0, 10]), bytes([244, 0, 10, 1]), bytes([0, 10, 1, 2])])
    )
    assert index.holders(bytes([244, 0, 10, 244])) == 0
    assert index.holders(bytes([244, 0, 10, 1])) == 1
