"""`overlay uninstall` and `overlay release` take what is of IPv6, too."""

from __future__ import annotations


def test_nothing_of_either_family_is_left(world6):
    one, _ = world6.nodes(2, "--ip-masq")
    world6.pod_ends(one, "a")
    assert "flannel-v6.1" in world6.run("node1", "ip", "link")
    one.stop()
    flags = one.command[one.command.index("-m") + 2 :]
    command = (one.command[2], "-m", "overlay.cli.app")
    planned = world6.run("node1", *command, "uninstall", "--dry-run", *flags).splitlines()
    assert "flannel-v6.1" in world6.run("node1", "ip", "link"), "nothing was done"
    released = world6.run("node1", *command, "release", *flags)
    assert "fd00:10:244:" in released
    assert len(world6.records()) == 1, "the other node's"
    done = world6.run("node1", *command, "uninstall", *flags).splitlines()
    assert [line.replace("removed", "would remove") for line in done] == planned, "it does what it said"
    assert "flannel" not in world6.run("node1", "ip", "link")
    for family in ("-4", "-6"):
        assert world6.run("node1", "ip", family, "route", "show", "proto", "111") == ""
    assert "overlay" not in world6.run("node1", "nft", "list", "tables")
    assert not (one.run_dir / "subnet.env").exists()
    assert [path.name for path in one.run_dir.glob("device*")] == [], "by them a later run would take it for ours"
