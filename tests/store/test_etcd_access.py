"""Users, passwords, certificates and the least privileges that etcd can ask for."""

import json
import urllib.error
import urllib.request

import pytest

from lease.store import StoreUnavailable
from tests.support.etcd import Etcd
from tests.support.feed import ROOT, b64, decoded, put
from tests.support.pki import authority, openssl, request
from tests.support.wait import until


def test_user_and_password_without_tls_and_tokens_that_end(tmp_path, follow, open_store):
    etcd = Etcd(tmp_path, flags=("--auth-token-ttl", "2"))
    try:
        put(etcd, 1)
        for path, body in (
            ("/v3/auth/user/add", {"name": "root", "password": "secret"}),
            ("/v3/auth/role/add", {"name": "root"}),
            ("/v3/auth/user/grant", {"user": "root", "role": "root"}),
            ("/v3/auth/enable", {}),
        ):
            etcd.ask(path, body)
        with pytest.raises(StoreUnavailable, match=r"(?i)user name is empty|permission"):
            open_store(etcd.endpoint).read()
        with pytest.raises(StoreUnavailable, match=r"(?i)authentication failed"):
            open_store(etcd.endpoint, username="root", password="wrong").read()
        store = open_store(etcd.endpoint, username="root", password="secret")
        assert len(store.read().leases) == 1
        token_ends(etcd)
        made = store.create(decoded(2), 100)
        assert store.keep_alive(made).left_s
        follower = follow(etcd.endpoint, username="root", password="secret")
        until("a record comes by the watch", lambda: len(follower.view) == 2)
        token_ends(etcd)
        store.create(decoded(3), 100)
        until("and another after the token ended", lambda: len(follower.view) == 3)
    finally:
        etcd.close()


def token_ends(etcd: Etcd) -> None:
    """Wait until a token of now is one of before: those that were made earlier are, too."""
    token = etcd.ask("/v3/auth/authenticate", {"name": "root", "password": "secret"})["token"]

    def refused() -> bool:
        request = urllib.request.Request(
            f"{etcd.endpoint}/v3/kv/range", json.dumps({"key": "YQ=="}).encode(), {"Authorization": token}
        )
        try:
            with urllib.request.urlopen(request, timeout=5):
                return False
        except urllib.error.HTTPError as error:
            with error:
                return True

    # each use of a token prolongs it: asked seldom
    until("the token has ended", refused, 20, 2.5)


def test_tls_with_and_without_a_client_certificate(tmp_path, open_store):
    pki(tmp_path)
    flags = ("--cert-file", f"{tmp_path}/server.crt", "--key-file", f"{tmp_path}/server.key")
    etcd = Etcd(tmp_path / "one", flags=flags, scheme="https")
    try:
        ca = f"{tmp_path}/ca.crt"
        assert open_store(etcd.endpoint, cafile=ca).read().leases == {}, "a CA file alone is enough"
        with pytest.raises(StoreUnavailable):
            open_store(etcd.endpoint).read()
        with pytest.raises(StoreUnavailable):
            open_store(etcd.endpoint.replace("https", "http")).read()
    finally:
        etcd.close()
    etcd = Etcd(tmp_path / "two", flags=(*flags, "--client-cert-auth", "--trusted-ca-file", ca), scheme="https")
    try:
        with pytest.raises(StoreUnavailable):
            open_store(etcd.endpoint, cafile=ca).read()
        store = open_store(
            etcd.endpoint, cafile=ca, certfile=f"{tmp_path}/client.crt", keyfile=f"{tmp_path}/client.key"
        )
        assert store.read().leases == {}
    finally:
        etcd.close()


def pki(folder) -> None:
    """A CA, a server and a client certificate."""
    authority(folder)
    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("server", "client"):
        request(folder, name)
        signing = (
            f"x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out {name}.crt -days 2 -extfile ext"
        )
        openssl(folder, signing)


def test_the_least_privilege_that_etcd_md_names_is_enough(tmp_path, open_store):
    etcd = Etcd(tmp_path)
    try:
        etcd.put(f"{ROOT}/config", "{}")
        rights = [(0, f"{ROOT}/", f"{ROOT}0"), (2, f"{ROOT}/subnets/", f"{ROOT}/subnets0")]
        for path, body in (
            ("/v3/auth/user/add", {"name": "root", "password": "r"}),
            ("/v3/auth/role/add", {"name": "root"}),
            ("/v3/auth/user/grant", {"user": "root", "role": "root"}),
            ("/v3/auth/user/add", {"name": "overlay", "password": "secret"}),
            ("/v3/auth/role/add", {"name": "overlay"}),
            *(
                (
                    "/v3/auth/role/grant",
                    {"name": "overlay", "perm": {"permType": kind, "key": b64(key), "range_end": b64(end)}},
                )
                for kind, key, end in rights
            ),
            ("/v3/auth/user/grant", {"user": "overlay", "role": "overlay"}),
            ("/v3/auth/enable", {}),
        ):
            etcd.ask(path, body)
        store = open_store(etcd.endpoint, username="overlay", password="secret")
        made = store.create(decoded(2), 100)
        assert store.read().leases == {made.key: made}
        watching = store.watch(made.modified)
        changed = store.change(made, made._replace(node="m/n/l"))
        assert next(watching).changes == (changed,)
        assert store.keep_alive(changed).left_s
        store.remove(changed)
        watching.close()
    finally:
        etcd.close()
