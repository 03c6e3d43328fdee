"""Rules as `iptables -S` writes them, in the form in which `nft -j` lists rules. Pure.

For the old tables, which nft does not see, and for those in nftables whose extensions nft cannot write out.
"""

from __future__ import annotations

import shlex
from typing import Any

_FIELDS = {"-s": "saddr", "-d": "daddr"}
_INTERFACES = {"-i": "iifname", "-o": "oifname"}
_VERDICTS = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "reject", "RETURN": "return", "MASQUERADE": "masquerade",
             "SNAT": "snat"}  # fmt: skip
_SILENT = {"LOG", "NFLOG", "MARK", "CONNMARK", "CT", "NOTRACK", "TCPMSS", "TRACE"}
"""Targets after which the next rule is asked."""
_ELSEWHERE = {"DNAT", "REDIRECT", "TPROXY", "QUEUE", "NFQUEUE", "SYNPROXY"}
"""Targets that give the packet to somebody else."""
_UNCLEAR: dict[str, Any] = {"match": {"op": "==", "left": None, "right": None}}


def rules(lines: list[str], protocol: str) -> list[dict[str, Any]]:
    """The rules of one chain; each has its line as `text`. protocol: `ip` or `ip6`."""
    return [_rule(line, protocol) for line in lines if line.startswith("-A ")]


def policy(lines: list[str]) -> str:
    """The chain's: `accept` or `drop`."""
    return next((line.split()[2].lower() for line in lines if line.startswith("-P ")), "accept")


def _rule(line: str, protocol: str) -> dict[str, Any]:
    expr: list[dict[str, Any]] = []
    negated = False
    words = iter(_words(line)[2:])
    for word in words:
        if word == "!":
            negated = True
            continue
        if word in ("-j", "-g"):  # what follows are the target's own options
            expr += _target("jump" if word == "-j" else "goto", next(words, ""))
            break
        expr += _one(word, words, "!=" if negated else "==", protocol)
        negated = False
    return {"expr": expr, "text": line}


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def _one(word: str, words: Any, op: str, protocol: str) -> list[dict[str, Any]]:
    """What an option, with its value, stands for."""
    if word == "-m":
        next(words, "")
        return []
    value = next(words, "")
    if word in _FIELDS:
        return [_match(op, {"payload": {"protocol": protocol, "field": _FIELDS[word]}}, value)]
    if word in _INTERFACES:
        name = value[:-1] + "*" if value.endswith("+") else value
        return [_match(op, {"meta": {"key": _INTERFACES[word]}}, name)]
    if word == "-p":
        return [_match(op, {"meta": {"key": "l4proto"}}, value)]
    if word in ("--dport", "--dports"):
        return [
            _match(op, {"payload": {"protocol": "th", "field": "dport"}}, [_port(each) for each in value.split(",")])
        ]
    if word in ("--ctstate", "--state"):
        return [_match(op, {"ct": {"key": "state"}}, value.lower().split(","))]
    if word == "--comment":
        return []
    return [_UNCLEAR]


def _target(kind: str, name: str) -> list[dict[str, Any]]:
    if name in _VERDICTS:
        return [{_VERDICTS[name]: None}]
    if name in _ELSEWHERE:
        return [{"queue": None}]
    return [] if name in _SILENT else [{kind: {"target": name}}]


def _port(text: str) -> Any:
    first, colon, last = text.partition(":")
    try:
        return {"range": [int(first or 0), int(last or 65535)]} if colon else int(first)
    except ValueError:
        return text


def _match(op: str, left: dict[str, Any], right: Any) -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}
