"""A real etcd for a test: on loopback or inside a namespace; frozen, killed, restarted, compacted; asked over its JSON
gateway, so that no second gRPC client stands beside the one that is tested."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

from overlay.lab import netns
from overlay.lab.processes import etcd_binary
from tests.support.ports import free_port


class Etcd:
    """One etcd server."""

    def __init__(
        self,
        folder: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        namespace: str = "",
        flags: tuple[str, ...] = (),
        scheme: str = "http",
        peer: int = 0,
        also: str = "",
    ) -> None:
        """also: another host that it listens at."""
        self.also = also
        self.folder, self.host, self.port, self.namespace = folder, host, port or free_port(), namespace
        self.scheme, self.flags = scheme, flags
        self.peer = peer or free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"

    @property
    def other_endpoints(self) -> list[str]:
        return [f"{self.scheme}://[{self.also}]:{self.port}"] if self.also else []

    def start(self) -> None:
        command = [
            etcd_binary(), "--data-dir", str(self.folder / "data"), "--unsafe-no-fsync", "--log-level", "error",
            "--listen-client-urls", ",".join((self.endpoint, *self.other_endpoints)), "--advertise-client-urls", self.endpoint,
            "--listen-peer-urls", f"http://127.0.0.1:{self.peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{self.peer}",
            "--initial-cluster", f"default=http://127.0.0.1:{self.peer}", *self.flags,
        ]  # fmt: skip
        if self.namespace:
            command = ["nsenter", f"--net={netns.path(self.namespace)}", *command]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "etcd.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise AssertionError(f"etcd ended: {(self.folder / 'etcd.log').read_text()[-500:]}")
            try:
                if self.scheme == "https":
                    self._shake_hands()  # it does no sooner than it serves
                    return
                self.ask("/v3/kv/range", {"key": _b64("x")})
                return
            except (OSError, http.client.HTTPException, AssertionError):
                time.sleep(0.03)
        raise AssertionError(f"etcd does not come up: {(self.folder / 'etcd.log').read_text()[-500:]}")

    def _shake_hands(self) -> None:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection((self.host, self.port), 2) as plain, context.wrap_socket(plain):
            pass

    def ask(self, path: str, body: dict[str, Any], timeout_s: float = 5.0) -> dict[str, Any]:
        def connect() -> socket.socket:
            return socket.create_connection((self.host, self.port), timeout_s)

        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        connection.sock = netns.inside(self.namespace, connect) if self.namespace else connect()
        try:
            connection.request("POST", path, json.dumps(body))
            answer = connection.getresponse()
            data = answer.read()
            assert answer.status == 200, data
            return dict(json.loads(data))
        finally:
            connection.close()

    def put(self, key: str, value: str | bytes, lease: int = 0) -> int:
        answer = self.ask("/v3/kv/put", {"key": _b64(key), "value": _b64(value), "lease": str(lease)})
        return int(answer["header"]["revision"])

    def delete(self, key: str) -> int:
        return int(self.ask("/v3/kv/deleterange", {"key": _b64(key)})["header"]["revision"])

    def get(self, prefix: str) -> dict[str, dict[str, Any]]:
        """key -> {value, lease, mod_revision, ...} below a prefix."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        answer = self.ask("/v3/kv/range", {"key": _b64(prefix), "range_end": _b64(end)})
        return {
            base64.b64decode(kv["key"]).decode("utf-8", "replace"): kv
            | {"value": base64.b64decode(kv.get("value", "")), "lease": int(kv.get("lease", 0))}
            for kv in answer.get("kvs", [])
        }

    def grant(self, ttl_s: int) -> int:
        return int(self.ask("/v3/lease/grant", {"TTL": str(ttl_s)})["ID"])

    def revoke(self, lease: int) -> None:
        self.ask("/v3/lease/revoke", {"ID": str(lease)})

    def time_to_live(self, lease: int) -> int:
        return int(self.ask("/v3/lease/timetolive", {"ID": str(lease)}).get("TTL", -1))

    def compact(self, revision: int) -> None:
        self.ask("/v3/kv/compaction", {"revision": str(revision), "physical": True})

    def revision(self) -> int:
        return int(self.ask("/v3/kv/range", {"key": _b64("x")})["header"]["revision"])

    def no_space(self, action: str) -> None:
        """The alarm that makes it read-only. action: ACTIVATE or DEACTIVATE."""
        member = self.ask("/v3/maintenance/status", {})["header"]["member_id"]
        self.ask("/v3/maintenance/alarm", {"action": action, "memberID": member, "alarm": "NOSPACE"})

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        assert self.process is not None
        self._signal(signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self._signal(signal.SIGCONT)
            self.kill()

    def _signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self._pid(), number)

    def _pid(self) -> int:
        assert self.process is not None
        return self.process.pid  # nsenter execs: the pid stays


def _b64(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()
