"""What `overlay status` prints of a status."""

from __future__ import annotations

import io
import json

from overlay.cli import status, terminal

PEER = {
    "subnet": "10.244.9.0/24", "public_ip": "192.168.1.9", "vtep_mac": "62:ab:85:3d:45:d2", "node_name": "node9",
    "path": "direct", "ok": False, "missing": ["fdb", "route"],
}  # fmt: skip
FOUND = {
    "schema": 1, "version": "0.1.0", "node_name": "node1", "ready": False, "uptime_s": 1.0,
    "problems": [{"subject": "kernel", "text": "2 entries are not as they should be", "since": "2026-11-28T05:00:00Z", "keeps_unready": True}],
    "store": {"type": "etcd", "address": "etcd there", "up": False, "error": "no answer"},
    "network": {"subnets": {"ipv4": {"network": "10.244.0.0/16"}}}, "underlay": None, "lease": None, "device": None,
    "peers": [PEER], "refused_records": [{"key": "10.244.8.0-24", "reason": "[bold]not JSON[/]"}, {"key": "k", "reason": "who can tell" + " and so on" * 99 + " of a long tale"}], "differing_entries": 2,
    "differences": [{"table": "route", "entry": "10.244.9.0/24 metric 10", "state": "missing", "error": "EPERM", "tries": 3}],
    "conflicting_routes": [{"destination": "10.244.9.0/26", "via": "", "device": "", "metric": 0, "protocol": 3}],
    "retained_subnets": ["10.244.7.0/24"], "counters": {"mended_route": 2, "dropped_spoofed": 0},
}  # fmt: skip


def test_everything_that_is_not_as_it_should_be_is_listed():
    assert list(status.differences(FOUND)) == [
        ("kernel", "2 entries are not as they should be (since 2026-11-28T05:00:00Z)"),
        ("store", "no answer (datapath and peers stay as they are)"),
        ("record 10.244.8.0-24", "not used: [bold]not JSON[/]"),
        ("record k", "not used: who can tell" + " and so on" * 99 + " of a long tale"),
        ("route 10.244.9.0/24 metric 10", "missing, refused 3 times: EPERM"),
        ("route 10.244.9.0/26 to nowhere, or to several gateways metric 0 proto 3", "not ours, but preferred to ours"),
        ("subnet 10.244.7.0/24", "not ours any more; pods made before still use it here"),
    ]


def test_words_of_others_are_printed_as_they_are():
    """Neither markup nor the name of a picture, as which a part of a MAC can be read."""
    console = terminal.console()
    console.file = out = io.StringIO()
    status.show(console, FOUND, all_peers=True)
    text = out.getvalue()
    for word in ("62:ab:85:3d:45:d2", "[bold]not JSON[/]", "fdb, route", "mended", "route 2", "overlayd 0.1.0 node1"):
        assert word in text
    assert "spoofed" not in text, "nothing was dropped"


def asked(*arguments: str, answer: object = None, error: OSError | None = None, monkeypatch):
    """Exit status, output and errors of `overlay status` with an agent that answers so."""
    from click.testing import CliRunner

    def ask_unix(path: str, route: str) -> tuple[int, str]:
        assert (path, route) == ("/run/nowhere/overlay.sock", "/status")
        if error is not None:
            raise error
        return 200, json.dumps(answer)

    monkeypatch.setattr(status, "ask_unix", ask_unix)
    found = CliRunner().invoke(status.status, ["--run-dir", "/run/nowhere", *arguments])
    return found.exit_code, found.stdout, found.stderr


def test_exit_statuses(monkeypatch):
    ready = {**FOUND, "ready": True}
    assert asked(answer=ready, monkeypatch=monkeypatch)[0] == 0
    assert asked(answer=FOUND, monkeypatch=monkeypatch)[0] == 1
    assert asked("--nonsense", monkeypatch=monkeypatch)[0] == 2
    code, _, words = asked(error=FileNotFoundError(2, "No such file"), monkeypatch=monkeypatch)
    assert (code, "does overlayd run?" in words) == (3, True)
    code, _, words = asked(error=PermissionError(13, "Permission denied"), monkeypatch=monkeypatch)
    assert (code, "sudo" in words) == (3, True)


def test_piped_output_is_plain_columns(monkeypatch):
    text = asked("-o", "wide", answer=FOUND, monkeypatch=monkeypatch)[1]
    (line,) = [line for line in text.splitlines() if line.startswith("10.244.9.0/24")]
    assert line.split() == ["10.244.9.0/24", "192.168.1.9", "62:ab:85:3d:45:d2", "node9", "direct", "fdb,", "route"]
    assert not set(text) & set("│─┃━┌")
    (long,) = [line for line in text.splitlines() if "who can tell" in line]
    assert "of a long tale" in long, "nothing is folded"
    assert all(line == line.rstrip() for line in text.splitlines()), "nor filled up"


def test_everything_as_json_or_yaml(monkeypatch):
    import yaml

    for output, read in (("json", json.loads), ("yaml", yaml.safe_load)):
        assert read(asked("-o", output, answer=FOUND, monkeypatch=monkeypatch)[1]) == FOUND
