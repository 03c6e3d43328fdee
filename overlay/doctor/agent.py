"""The agent, its store, its lease and what pods are made with."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overlay.ask.client import NoAnswer, Refusal, ask_agent, secret_in
from overlay.cni.lists import CONFLIST
from overlay.cni.plugins import PLUGIN_PLACES
from overlay.doctor.finding import Finding, Findings, State, ok, unknown
from overlay.page.gather import ROUTE as SUMMARY

SOON_S = 120
CLOCKS_ASKED, CLOCKS_APART_S = 5, 5


def agent(found: Mapping[str, Any]) -> Findings:
    """What it says itself: each of its problems is a finding."""
    problems = found["problems"]
    for problem in problems:
        yield Finding(
            f"agent: {problem['subject']}",
            State.WRONG if problem["keeps_unready"] else State.WARN,
            problem["text"],
            "pods do not reach all others" if problem["keeps_unready"] else "",
            "as it says, and docs/operations.md",
        )
    if not problems:
        yield ok(
            "agent", f"overlayd {found['version']} has run for {found['uptime_s']:.0f} s and says nothing is wrong"
        )
    if found["refused_records"]:
        first = found["refused_records"][0]
        yield Finding(
            "records",
            State.WARN,
            f"{len(found['refused_records'])} are not used, as {first['key']}: {first['reason']}",
            "their nodes' pods cannot be reached from here",
            "overlay status names each; docs/refused-records.md",
        )


def store(found: Mapping[str, Any]) -> Findings:
    """Whether it answers."""
    it = found["store"]
    if not it["up"]:
        yield Finding(
            "store",
            State.WRONG,
            f"{it['address']}: {it['error']}",
            "who joins or leaves is not seen",
            "is it up, and reachable?",
        )
    else:
        yield ok("store", f"{it['address']} answers")


def lease(found: Mapping[str, Any]) -> Findings:
    """Whether there is one, and for how long."""
    it = found["lease"]
    if not it:
        yield Finding("lease", State.WRONG, "none", "no pod can be made here", "overlay status says what it waits for")
    elif it["left_s"] is not None and it["left_s"] < SOON_S:
        yield Finding(
            "lease",
            State.WARN,
            f"{it['subnet']} ends in {it['left_s']} s",
            "another node may take it then",
            "is the store up?",
        )
    else:
        yield ok("lease", f"{it['subnet']} ({it['method']})")


def clocks(found: Mapping[str, Any]) -> Findings:
    """Whether other nodes' clocks say the same as this one's; asked of a few, where agents ask each other."""
    subject, asking, peers = "clocks", found.get("asking"), found["peers"]
    if not asking or not peers:
        why = "there are no peers" if asking else "agents do not ask each other here (--ask-secret-file)"
        yield unknown(subject, f"other nodes' were not compared with this one's: {why}")
        return
    secret, apart, same = secret_in(asking["secret_file"]), list[str](), 0
    for peer in random.sample(peers, min(len(peers), CLOCKS_ASKED)):
        name = peer["node_name"] or peer["public_ip"]
        addresses = (peer["subnet"].partition("/")[0], peer["public_ip"])
        try:
            there = ask_agent(addresses, asking["port"], secret, SUMMARY)["time_s"]
            differ = abs(int(time.time()) - there)
        except Refusal as error:  # by the time of our question, which it does not believe
            apart += [f"{name} ({error})"] * ("clock" in str(error))
            continue
        except (NoAnswer, KeyError):
            continue
        same += differ <= CLOCKS_APART_S
        apart += [f"{name} ({differ} s)"] * (differ > CLOCKS_APART_S)
    if apart:
        yield Finding(
            subject,
            State.WARN,
            f"this node's clock and that of {', '.join(apart)} differ",
            "agents that are more than a minute apart do not answer each other; certificates may seem to be over",
            "on both: timedatectl, or chronyc tracking; apt-get install chrony",
        )
    elif same:
        yield ok(subject, f"those of {same} other nodes say the same as this one's")
    else:
        yield unknown(subject, "no other node's agent answered")


def cni(root: Path, conf_dir: str) -> Findings:
    """The network list that the runtime takes, and the plugins that it names."""
    folder = root / conf_dir.lstrip("/") if conf_dir else None
    if folder is None:
        yield ok("CNI", "no network list is written (--cni-conf-dir=)")
        return
    lists = (
        sorted(path.name for path in folder.glob("*") if path.suffix in (".conf", ".conflist", ".json"))
        if folder.is_dir()
        else []
    )
    if CONFLIST not in lists:
        yield Finding(
            "CNI",
            State.WRONG,
            f"{conf_dir}/{CONFLIST} is not there",
            "no pod can be made here",
            "overlay status: the agent writes it",
        )
        return
    if lists[0] != CONFLIST:
        yield Finding(
            "CNI",
            State.WRONG,
            f"{conf_dir}/{lists[0]} stands before {CONFLIST}",
            "the runtime takes the first in the order of names: pods get their network from that one",
            f"if nobody needs it: rm {conf_dir}/{lists[0]}",
        )
    else:
        yield ok("CNI", f"{conf_dir}/{CONFLIST} is the first")
    yield from _plugins(root, folder / CONFLIST)


def _plugins(root: Path, path: Path) -> Findings:
    try:
        named = {str(each["type"]) for each in json.loads(path.read_text())["plugins"]}
    except (OSError, ValueError, KeyError, TypeError):
        yield Finding("CNI", State.WRONG, f"{path} cannot be read", "no pod can be made here", "overlay status")
        return
    wanted = sorted(named | ({"host-local", "loopback"} if "bridge" in named else set()))
    places = [root / place.lstrip("/") for place in reversed(PLUGIN_PLACES)]
    missing = [name for name in wanted if not any(os.access(place / name, os.X_OK) for place in places)]
    if not missing:
        yield ok("CNI plugins", f"{', '.join(wanted)} are there")
    elif any(place.is_dir() for place in places):
        yield Finding(
            "CNI plugins",
            State.WRONG,
            f"{', '.join(missing)}: neither in {' nor in '.join(PLUGIN_PLACES)}",
            "no pod can be made here",
            "overlay install-cni --to /opt/cni/bin, or apt-get install containernetworking-plugins",
        )
    else:
        yield unknown("CNI plugins", "no folder of plugins can be seen from here (a container sees its own files)")
