"""`overlay release` and `overlay uninstall` ask on a terminal, and only there."""

from __future__ import annotations

import os

import pytest
from click.testing import CliRunner

from overlay.cli import app
from overlay.teardown import release, uninstall


@pytest.fixture
def done(monkeypatch) -> list[str]:
    """What would have been done."""
    found: list[str] = []

    def give_up(_settings, dry_run: bool = False) -> str:
        found.append(f"release dry_run={dry_run}")
        return "10.244.1.0-24"

    def remove(_settings, force: bool = False, dry_run: bool = False, network: int | None = None):
        found.append(f"uninstall force={force} dry_run={dry_run}")
        yield "device flannel.1"

    monkeypatch.setattr(release, "release", give_up)
    monkeypatch.setattr(uninstall, "uninstall", remove)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return found


def run(*words: str, typed: str = "", terminal: bool = True, monkeypatch):
    monkeypatch.setattr(app, "_on_terminal", lambda: terminal)
    return CliRunner().invoke(app.app, [*words, "--run-dir=/run/overlay-test"], input=typed)


def test_no_is_no(done, monkeypatch):
    for word in ("release", "uninstall"):
        assert run(word, typed="n\n", monkeypatch=monkeypatch).exit_code == 1
    assert done == ["release dry_run=True"], "it asks with the record's name, and does nothing"


def test_yes_is_yes(done, monkeypatch):
    assert "release 10.244.1.0-24?" in run("release", typed="y\n", monkeypatch=monkeypatch).stdout
    assert "lose their network [y/N]" in run("uninstall", typed="y\n", monkeypatch=monkeypatch).stdout
    assert done == ["release dry_run=True", "release dry_run=False", "uninstall force=False dry_run=False"]


def test_nobody_is_asked_where_nobody_is_or_yes_was_said(done, monkeypatch):
    for word in ("release", "uninstall"):
        assert run(word, terminal=False, monkeypatch=monkeypatch).exit_code == 0
        assert run(word, "--yes", monkeypatch=monkeypatch).exit_code == 0
        assert "would" in run(word, "--dry-run", monkeypatch=monkeypatch).stdout
    assert len(done) == 6
    assert [line for line in done if "dry_run=True" in line] == [
        "release dry_run=True", "uninstall force=False dry_run=True"
    ]  # fmt: skip


def test_only_root_may(done, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for word in ("release", "uninstall"):
        found = run(word, "--yes", monkeypatch=monkeypatch)
        assert (found.exit_code, "sudo" in found.stderr) == (1, True)
    assert done == []
