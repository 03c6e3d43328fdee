"""Rules as `iptables -S` writes them, in the form in which `nft -j` lists rules. Pure.

For the old tables, which nft does not see, and for those in nftables whose extensions nft cannot write out.
"""

from __future__ import annotations

from typing import Any

_FIELDS = {"-s": "saddr", "-d": "daddr"}
_INTERFACES = {"-i": "iifname", "-o": "oifname"}
_VERDICTS = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "reject", "RETURN": "return", "MASQUERADE": "masquerade",
             "SNAT": "snat", "DNAT": "dnat", "REDIRECT": "redirect"}  # fmt: skip
_SILENT = {"LOG", "NFLOG", "MARK", "CONNMARK", "CT", "NOTRACK", "TCPMSS", "TRACE"}
"""Targets after which the next rule is asked."""
_ELSEWHERE = {"TPROXY", "QUEUE", "NFQUEUE", "SYNPROXY"}
"""Targets that give the packet to somebody else."""
_UNCLEAR: dict[str, Any] = {"match": {"op": "==", "left": None, "right": None}}


def rules(lines: list[str], protocol: str) -> list[dict[str, Any]]:
    """The rules of one chain; each has its line as `text`. protocol: `ip` or `ip6`."""
    return [_rule(line, protocol) for line in lines if line.startswith("-A ")]


def policy(lines: list[str]) -> str:
    """The chain's: `accept` or `drop`."""
    return next((line.split()[2].lower() for line in lines if line.startswith("-P ")), "accept")


def _rule(line: str, protocol: str) -> dict[str, Any]:
    import shlex  # 3.5 ms of a start, and peers come first

    expr: list[dict[str, Any]] = []
    try:
        words = shlex.split(line)[2:]
    except ValueError:  # no closing quote: it may do anything
        return {"expr": [{"queue": None}], "text": line}
    negated, at = False, 0
    while at < len(words):
        word, at = words[at], at + 1
        if word == "!":
            negated = True
            continue
        values = []
        while at < len(words) and not _is_option(words[at]):
            values.append(words[at])
            at += 1
        if word in ("-j", "-g"):  # what follows are the target's own options
            expr += _target("jump" if word == "-j" else "goto", values[0] if values else "")
            break
        expr += _one(word, values, "!=" if negated else "==", protocol)
        negated = False
    return {"expr": expr, "text": line}


def _is_option(word: str) -> bool:
    return word == "!" or (word.startswith("-") and not word[1:2].isdecimal())


def _one(word: str, values: list[str], op: str, protocol: str) -> list[dict[str, Any]]:
    """What an option, with its values, stands for."""
    value = values[0] if values else ""
    if word in ("-m", "--comment"):
        return []
    if word in _FIELDS:
        return [_match(op, {"payload": {"protocol": protocol, "field": _FIELDS[word]}}, value)]
    if word in _INTERFACES:
        name = value[:-1] + "*" if value.endswith("+") else value
        return [_match(op, {"meta": {"key": _INTERFACES[word]}}, name)]
    if word == "-p":
        return [_match(op, {"meta": {"key": "l4proto"}}, value)]
    if word in ("--dport", "--dports"):
        ports = [_port(each) for each in value.split(",")]
        return [_match(op, {"payload": {"protocol": "th", "field": "dport"}}, ports)]
    if word in ("--ctstate", "--state"):
        return [_match(op, {"ct": {"key": "state"}}, value.lower().split(","))]
    if word in ("--dst-type", "--src-type"):
        flags = "daddr" if word == "--dst-type" else "saddr"
        return [_match(op, {"fib": {"result": "type", "flags": flags}}, value.lower().split(","))]
    if word == "--mark":
        return [_mark(op, value)]
    return [_UNCLEAR]


def _mark(op: str, value: str) -> dict[str, Any]:
    mark, _, mask = value.partition("/")
    try:
        left = {"&": [{"meta": {"key": "mark"}}, int(mask, 0) if mask else 0xFFFFFFFF]}
        return _match(op, left, int(mark, 0))
    except ValueError:
        return _UNCLEAR


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
