"""What is deferred exists, stays unrun in an agent, and is there when somebody asks; each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from overlay.process.defer import BY_SUBMODULES, WHOLE

AGENT = """
import json, sys
from overlay.process import defer
defer.install()
import overlay.main, overlay.agent.loop, overlay.process.files, lease.tenure.keeper, lease.store, lease.tenure.etcd, lease.stores.etcd
import overlay.compose, overlay.kernel.monitor
print(json.dumps({"ran": defer.ran(), "modules": sorted(sys.modules)}))
"""
TWO_THREADS = """
import sys, threading
from overlay.process import defer
defer.install()
import asyncio, inspect
found, ready = [], threading.Barrier(8)
def ask():
    ready.wait()
    found.append((asyncio.Queue, inspect.signature, asyncio.events.get_event_loop))
threads = [threading.Thread(target=ask) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join(20) for thread in threads]
assert len(found) == 8 and len(set(found)) == 1, found
assert {"asyncio", "inspect"} <= set(defer.ran()), defer.ran()
import asyncio as again
assert again.run is asyncio.run
try:
    asyncio.there_is_no_such_thing
except AttributeError as error:
    assert "no attribute" in str(error), error
print("ok")
"""
WHOLE_PACKAGE = """
from overlay.process import defer
defer.install()
import pyroute2, pyroute2.netlink.rtnl.ifinfmsg
assert "pyroute2" not in defer.ran()
assert pyroute2.netns.__name__ == "pyroute2.netns" and "pyroute2" not in defer.ran()
pyroute2.IPRoute
assert "pyroute2" in defer.ran()
print("ok")
"""


def run(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [*WHOLE, *BY_SUBMODULES])
def test_every_deferred_module_exists(name):
    """One that a library renamed would be imported plainly again, and cost what it cost."""
    assert importlib.util.find_spec(name) is not None


def test_an_agent_on_etcd_runs_none_of_them():
    found = json.loads(run(AGENT))
    # from Python 3.13 on dataclasses ask inspect for annotations, and h2's events are dataclasses
    assert found["ran"] == (["inspect"] if sys.version_info >= (3, 13) else [])
    assert not {
        "kubernetes",
        "rich.console",
        "asyncio.events",
        "http.client",
        "hashlib",
        "ctypes",
        "subprocess",
        "ssl",
        "overlay.api.status",
    } & set(found["modules"])


ON_NODES = """
import json, sys
from overlay.process import defer
defer.install()
import overlay.main, overlay.agent.loop, overlay.process.files, lease.tenure.keeper, lease.store, lease.tenure.kubernetes, lease.stores.kubernetes
import overlay.compose, overlay.kernel.monitor
from lease.kube.client import KubeClient, KubeSettings
KubeClient(KubeSettings(api_url="https://127.0.0.1:1"))._connected()
overlay.main.StoreHosts(("https://127.0.0.1:1",))
import kubernetes.config.incluster_config, kubernetes.config.kube_config
print(json.dumps({"ran": defer.ran(), "modules": sorted(sys.modules)}))
"""
HOMES_ARE = """
import importlib
from overlay.process import defer
for (package, name), home in {**defer.SOURCES, **defer.LATER}.items():
    assert getattr(importlib.import_module(package), name) is getattr(importlib.import_module(home), name), name
print("ok")
"""
HOMES_SERVE = """
from overlay.process import defer
defer.install()
from kubernetes.config import kube_config
assert kube_config.Configuration.__module__ == "kubernetes.client.configuration"
assert type(kube_config.ApiClient()).__module__ == "kubernetes.client.api_client"
assert kube_config.OAuth2Session("me").client_id == "me"
print("ok")
"""


def test_an_agent_on_nodes_runs_none_of_them():
    found = json.loads(run(ON_NODES))
    assert set(found["ran"]) <= {"inspect"}  # typing_extensions asks for it
    unused = {"pydantic", "requests", "dateutil", "kubernetes.client.api_client"}
    assert not (unused | {"importlib.metadata", "asyncio.events", "grpc", "etcd3", "h2"}) & set(found["modules"])


@pytest.mark.parametrize("program", [HOMES_ARE, HOMES_SERVE])
def test_what_is_taken_from_its_home_is_what_the_package_has(program):
    assert run(program) == "ok\n"


def test_two_threads_may_ask_first_at_once():
    assert run(TWO_THREADS) == "ok\n"


def test_a_package_runs_when_something_of_its_own_is_asked_for():
    assert run(WHOLE_PACKAGE) == "ok\n"
