"""etcd's certificates and ours, replaced under a running client: a real etcd with TLS that demands client certificates."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lease.config import parse_config
from lease.store import StoreDown
from lease.tenure.claim import Answer, Claim, Identity
from lease.tenure.etcd import Tenure
from lease.tenure.events import Denied, Held, Renewed
from lease.tenure.keeper import TenureThread
from tests.support.etcd import Etcd
from tests.support.feed import Follower, follows, put
from tests.support.pki import EXPIRED, authority, request, signed
from tests.support.ports import free_port
from tests.support.wait import until

CONFIG = parse_config('{"Network":"10.244.0.0/16"}')
CLAIM = Claim(CONFIG, 0xC0A801FE, 0x0A00000000FE, Identity("machine", "n254", "02:00:00:00:00:fe"), None, False)
FILES = ("ca.crt", "client.crt", "client.key")


class Site:
    """An etcd with TLS, which a test asks by a second port without; the agent's files in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._times = folder, 0
        self.server, self.ours = folder / "server", folder / "ours"
        for where in (self.server, self.ours):
            where.mkdir()
        self.authority("a")
        self.serve("a")
        for name in FILES:
            shutil.copy(folder / "a" / name, self.ours / name)
        self.port = free_port()
        plain = free_port()
        flags = (
            f"--listen-client-urls=https://127.0.0.1:{self.port},http://127.0.0.1:{plain}", "--client-cert-auth",
            f"--cert-file={self.server}/server.crt", f"--key-file={self.server}/server.key",
            f"--trusted-ca-file={self.server}/ca.crt",
        )  # fmt: skip
        self.etcd = Etcd(folder / "etcd", port=plain, flags=flags)
        self.endpoint = f"https://127.0.0.1:{self.port}"

    def authority(self, name: str) -> None:
        """A CA of that name, a client certificate, and those of a server: good, expired, for another address."""
        where = self._folder / name
        where.mkdir()
        authority(where)
        for whose in ("server", "client"):
            request(where, whose)
        signed(where, "client", "client.crt", "127.0.0.1", "-days 2")
        for out, address, dates in (
            ("server.crt", "127.0.0.1", "-days 2"),
            ("expired.crt", "127.0.0.1", EXPIRED),
            ("elsewhere.crt", "192.0.2.9", "-days 2"),
        ):
            signed(where, "server", out, address, dates)

    def serve(self, name: str, certificate: str = "server.crt") -> None:
        """What etcd reads when it starts."""
        where = self._folder / name
        for source, target in ((certificate, "server.crt"), ("server.key", "server.key"), ("ca.crt", "ca.crt")):
            shutil.copy(where / source, self.server / target)

    def again(self, name: str, certificate: str = "server.crt") -> None:
        """etcd, started again with another."""
        self.serve(name, certificate)
        self.etcd.restart()

    def replace(self, file: str, content: bytes) -> None:
        """One of our files, whole, as cert-manager and kubelets do it."""
        new = self.ours / f".{file}"
        new.write_bytes(content)
        os.rename(new, self.ours / file)

    def ours_of(self, name: str) -> None:
        """Our files, those of another CA."""
        for file in FILES:
            self.replace(file, (self._folder / name / file).read_bytes())


@pytest.fixture
def site(tmp_path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.etcd.close()


class Agent:
    """A feed and a tenure on one store, as the agent has them."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower
        self.said: list[object] = []
        tenure = Tenure(follower.store, lambda _address: Answer(True, None), 60, random.Random(1))
        self.thread = TenureThread(tenure, self.said.append, renew_within_s=0.2)
        self.thread.start()
        self.thread.claim(CLAIM)

    def close(self) -> None:
        self.thread.stop()
        self.follower.store.close()
        self.thread.join(20)
        assert not self.thread.is_alive()

    def renewals(self) -> int:
        return sum(isinstance(event, Renewed) for event in self.said)

    @property
    def downs(self) -> list[str]:
        return [event.reason for event in self.follower.events if isinstance(event, StoreDown)]


@pytest.fixture
def agent(site, follow, closing) -> Agent:
    put(site.etcd, 1)
    files = {"cafile": "ca.crt", "certfile": "client.crt", "keyfile": "client.key"}
    made = closing(Agent(follow(site.endpoint, **{flag: f"{site.ours}/{name}" for flag, name in files.items()})))
    until("it holds a lease", lambda: any(isinstance(event, Held) for event in made.said))
    follows(made.follower, site.etcd)
    return made


def whole(site: Site, agent: Agent, number: int) -> None:
    """List, watch and keep-alive all work."""
    follows(agent.follower, site.etcd)
    put(site.etcd, number)
    follows(agent.follower, site.etcd)
    before = agent.renewals()
    until("it is renewed", lambda: agent.renewals() > before + 2)


def test_another_certificate_of_the_same_authority(site, agent):
    request(site.server.parent / "a", "server")
    signed(site.server.parent / "a", "server", "server.crt", "127.0.0.1", "-days 2")
    site.again("a")
    whole(site, agent, 2)


def test_another_authority_on_both_sides_whichever_comes_first(site, agent):
    site.authority("b")
    site.ours_of("b")  # the connection that stands goes on
    whole(site, agent, 2)
    site.again("b")
    whole(site, agent, 3)
    site.again("a")
    until("it is told", lambda: "certificate verify failed" in agent.downs[-1])
    site.ours_of("a")
    whole(site, agent, 4)


@pytest.mark.parametrize(
    ("certificate", "said"),
    [("expired.crt", "certificate has expired"), ("elsewhere.crt", "not valid for '127.0.0.1'")],
)
def test_a_server_with_a_certificate_that_is_none_is_named_and_tried_again(site, agent, certificate, said):
    site.again("a", certificate)
    until("it is told", lambda: said in agent.downs[-1], 30)
    assert site.endpoint in agent.downs[-1]
    assert "\n" not in agent.downs[-1]
    assert len(agent.downs) < 20, "it tries without a pause"
    assert "10.244.1.0-24" in agent.follower.view, "what was known is kept"
    site.again("a")
    whole(site, agent, 2)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        pytest.param("client.crt", "half", "etcd-certfile", id="half a certificate"),
        pytest.param("client.key", "half", "etcd-keyfile", id="half a key"),
        pytest.param("client.key", "other", "etcd-keyfile", id="the key of another certificate"),
        pytest.param("ca.crt", "half", "etcd-cafile", id="half an authority"),
        pytest.param("ca.crt", "empty", "etcd-cafile", id="an empty authority"),
        pytest.param("client.crt", "gone", "etcd-certfile", id="none"),
    ],
)
def test_our_files_are_half_written_for_a_moment(site, agent, file, content, said):
    good = (site.ours / file).read_bytes()
    if content == "gone":
        (site.ours / file).unlink()
    else:
        other = (site.server.parent / "a/server.key").read_bytes()
        site.replace(file, {"half": good[: len(good) // 2], "other": other, "empty": b""}[content])
    before = agent.renewals()
    until("what stands goes on", lambda: agent.renewals() > before + 2)
    assert agent.downs == []
    site.etcd.restart()
    until("it is told which file", lambda: f"{said} {site.ours / file}" in agent.downs[-1].replace(":", ""), 30)
    assert ("etcd-cafile" in agent.downs[-1]) == (file == "ca.crt"), "it names what is wrong alone"
    assert "\n" not in agent.downs[-1]
    site.replace(file, good)
    whole(site, agent, 2)


def test_a_client_certificate_that_the_server_does_not_take(site, agent):
    """Its authority is not the server's: with TLS 1.3 the refusal comes after the handshake."""
    site.authority("b")
    for file in ("client.crt", "client.key"):
        site.replace(file, (site.server.parent / "b" / file).read_bytes())
    site.etcd.restart()
    until("it is told", lambda: "refuses our certificate (etcd-certfile)" in agent.downs[-1], 30)
    assert len(agent.downs) < 20, "it tries without a pause"
    for file in ("client.crt", "client.key"):
        site.replace(file, (site.server.parent / "a" / file).read_bytes())
    whole(site, agent, 2)
    assert not any(isinstance(event, Denied) for event in agent.said)
