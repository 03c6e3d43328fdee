"""Pods as a real API server (1.34.4) says them.

tests/unit/recordings/pods.json: four pods with named ports, a sidecar, an init container, owners, labels or none, the node's
network, one that ended, one without an address; a list of three of them, and a watch in which one changes and one goes.
"""

from __future__ import annotations

import json
from base64 import b64decode
from typing import Any

from lease.kube.objects import Answer
from lease.kube.watch import Objects, _json_page
from overlay.policy.feeds import PODS, RESOURCES
from overlay.policy.model import ContainerPort, Pod
from overlay.policy.resources import packed, pod_of, policy_of
from overlay.policy.sharing import Sharing
from tests.unit.recordings import FOLDER

SAID = {name: b64decode(text) for name, text in json.loads((FOLDER / "pods.json").read_text()).items()}


def listed() -> dict[str, Pod]:
    page = _json_page(Answer(SAID["list json"], False))
    assert page.token, "there is more"
    return {pod.key: pod for pod in map(pod_of, page.items)}


def test_a_list():
    found = listed()
    first = found["x/pod0"]
    named = (
        ContainerPort("http", 6, 80), ContainerPort("dns", 17, 53), ContainerPort("s", 132, 9), ContainerPort("https", 6, 443),
        ContainerPort("side", 17, 7001),
    )  # fmt: skip
    addresses = packed("10.244.1.2"), packed("fd00:10:244:1::2")
    labels = {"app": "web", "pod-template-hash": "5d4f", "empty": ""}
    assert first._replace(ports=()) == Pod("x/pod0", "x", "node0", labels, addresses, (), owner="deployment/web")
    assert first.name == "pod0"
    assert sorted(first.ports) == sorted(named), "an init container that ends serves nobody"
    assert (found["x/pod1"].alone, found["x/pod2"].alone) == (True, True), "it ended; it has the node's network"
    assert found["x/pod1"].owner == "", "what does not control it"


def test_a_watch():
    class Client:
        place = "nowhere"

    found: dict[str, Any] = {}
    objects = Objects(Client(), RESOURCES[PODS])  # type: ignore[arg-type]
    for line in SAID["watch json"].splitlines():
        objects._take(json.loads(line), found)
    assert found["x/pod0"].labels["app"] == "db"
    assert found["x/pod3"] is None
    assert objects._version.isdecimal()


def test_what_pods_have_in_common_is_kept_once():
    sharing = Sharing()
    first, second = (sharing.shared(listed()["x/pod0"]) for _ in range(2))
    assert first == second
    for name in ("labels", "namespace", "node", "ports", "owner"):
        assert getattr(first, name) is getattr(second, name), name
    spec = {
        "podSelector": {"matchLabels": {"a": "b"}},
        "ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": 80}]}],
    }
    one, two = (sharing.policy(policy_of({"metadata": {"name": name}, "spec": spec})) for name in ("p", "q"))
    assert (one.subject, one.ingress) == (two.subject, two.ingress)
    assert one.subject is two.subject
    assert one.ingress is two.ingress
    other = sharing.shared(first._replace(labels={**first.labels, "app": "db"}))
    assert other.labels["app"] == "db"
    assert first.labels["app"] == "web"


def test_a_silent_watch_is_doubted_for_the_price_of_one_object():
    """With a resourceVersion the API server ignores `limit`, and sends all pods there are: every eight seconds."""
    asked: list[dict[str, Any]] = []

    class Client:
        place = "nowhere"

        def ask(self, _path: str, query: dict[str, Any], *_: Any, **__: Any) -> None:
            asked.append(query)

    Objects(Client(), RESOURCES[PODS])._probe()  # type: ignore[arg-type]
    assert asked == [{"limit": 1}]
