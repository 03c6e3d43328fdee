"""Flags, environment, files -> Settings (frozen).

flanneld's flags and FLANNELD_ names with flanneld's meaning wherever we have the feature, a refusal in one line where we
have not. Source: flannel main.go (flags), pkg/util/flagutil (environment).
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

from lease.annotations import DEFAULT_PREFIX, Names
from lease.model import ip_number

ENV_PREFIX = "FLANNELD_"
DEFAULT_SUBNET_FILE = "/run/flannel/subnet.env"
DEFAULT_RUN_DIR = "/run/overlay"
DEFAULT_CNI_CONF_DIR = "/etc/cni/net.d"
LOG_LEVELS = ("debug", "info", "warning", "error")
LIVE = ("log-level", "ip-masq", "ip-masq-fully-random-disable", "iptables-forward-rules")
"""Flags that --live-settings may hold."""
LEASE_TTL_S = 86_400
"""flannel's: 24 hours (pkg/subnet/etcd/local_manager.go)."""


class SettingsError(ValueError):
    """A flag or variable is wrong: names it, its value and what is allowed."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator said. Paths may not exist yet; public_ip: 0 where not given."""

    etcd_endpoints: tuple[str, ...] = ("http://127.0.0.1:4001", "http://127.0.0.1:2379")
    etcd_prefix: str = "/coreos.com/network"
    etcd_keyfile: str = ""
    etcd_certfile: str = ""
    etcd_cafile: str = ""
    etcd_username: str = ""
    etcd_password: str = field(default="", repr=False)
    iface: tuple[str, ...] = ()
    iface_regex: tuple[str, ...] = ()
    iface_can_reach: int = 0
    public_ip: int = 0
    subnet_file: str = DEFAULT_SUBNET_FILE
    renew_margin_min: int = 60
    lease_ttl_s: int = LEASE_TTL_S
    ip_masq: bool = False
    fully_random: bool = True
    forward_rules: bool = True
    healthz_ip: str = "0.0.0.0"  # noqa: S104 (flannel's default; the port is off by default)
    healthz_port: int = 0
    run_dir: str = DEFAULT_RUN_DIR
    cni_conf_dir: str = DEFAULT_CNI_CONF_DIR
    cni_data_dir: str = ""
    cni_conf_template: str = ""
    node_name: str = ""
    kube: bool = False
    kube_api_url: str = ""
    kubeconfig: str = ""
    annotation_prefix: str = DEFAULT_PREFIX
    net_config_path: str = "/etc/kube-flannel/net-conf.json"
    tell_condition: bool = True
    live_settings: str = ""
    proc_sys_net: str = "/proc/sys/net"
    take_over: bool = False
    log_level: str = "info"
    log_format: str = "auto"

    @property
    def renew_within_s(self) -> float:
        """Renew the lease at the latest after so long: its life less flannel's margin."""
        return max(self.lease_ttl_s - self.renew_margin_min * 60, self.lease_ttl_s / 3)


class Flag(NamedTuple):
    """One flag. kind: str, int, bool, list or password; refuse: why a value other than the default is refused."""

    name: str
    kind: str
    default: Any
    text: str
    refuse: str = ""
    ours: bool = False


FLAGS = (
    Flag("etcd-endpoints", "str", "http://127.0.0.1:4001,http://127.0.0.1:2379", "etcd servers, comma-separated"),
    Flag("etcd-prefix", "str", "/coreos.com/network", "where the network's keys stand"),
    Flag("etcd-keyfile", "str", "", "client key for TLS"),
    Flag("etcd-certfile", "str", "", "client certificate for TLS"),
    Flag("etcd-cafile", "str", "", "CA that signed etcd's certificate"),
    Flag("etcd-username", "str", "", "etcd user"),
    Flag("etcd-password", "password", "", "its password; better given as FLANNELD_ETCD_PASSWORD"),
    Flag("iface", "list", (), "underlay interface, by name or address; repeatable, first match wins"),
    Flag("iface-regex", "list", (), "the same by a regular expression over addresses, then names; after all --iface"),
    Flag("iface-can-reach", "str", "", "underlay interface and address: those that route to this address"),
    Flag("public-ip", "str", "", "address that peers send to; one that is not local is advertised only"),
    Flag("subnet-file", "str", DEFAULT_SUBNET_FILE, "where subnet.env is written"),
    Flag("subnet-lease-renew-margin", "int", 60, "minutes before its end at which a lease is renewed at the latest"),
    Flag("ip-masq", "bool", False, "masquerade traffic that leaves the pod network"),
    Flag("ip-masq-fully-random-disable", "bool", False, "masquerade without fully random ports"),
    Flag("iptables-forward-rules", "bool", True, "accept forwarded pod traffic"),
    Flag("iptables-resync", "int", 5, "accepted; our rules are watched, not polled"),
    Flag("healthz-ip", "str", "0.0.0.0", "address of /healthz and /readyz"),  # noqa: S104
    Flag("healthz-port", "int", 0, "their port; 0 = off"),
    Flag("version", "bool", False, "print the version and exit"),
    Flag("v", "int", 0, "above 0: log level debug"),
    Flag("public-ipv6", "str", "", "", "there is no IPv6 datapath yet"),
    Flag("ip-blackhole-route", "bool", False, "", "there are no blackhole routes here"),
    Flag("kube-subnet-mgr", "bool", False, "take the subnet from this Node's podCIDR, peers from Kubernetes, not etcd"),
    Flag("kube-api-url", "str", "", "the API server; else --kubeconfig-file, else the pod's service account"),
    Flag("kubeconfig-file", "str", "", "kubeconfig with API server and credentials"),
    Flag("kube-annotation-prefix", "str", DEFAULT_PREFIX, "what the Node annotations' names begin with"),
    Flag("net-config-path", "str", "/etc/kube-flannel/net-conf.json", "the network config, with --kube-subnet-mgr"),
    Flag("set-node-network-unavailable", "bool", True, "set the Node's NetworkUnavailable to False once it is"),
    Flag("vmodule", "str", "", "", "use --log-level"),
    Flag("log_backtrace_at", "str", "", "", "use --log-level"),
    Flag("run-dir", "str", DEFAULT_RUN_DIR, "all else that the agent writes; one agent each", ours=True),
    Flag("cni-conf-dir", "str", DEFAULT_CNI_CONF_DIR, "where the CNI network list is written; empty = none", ours=True),
    Flag("cni-data-dir", "str", "", "dataDir of host-local in that list; empty = the plugin's own", ours=True),
    Flag(
        "cni-conf-template",
        "str",
        "",
        "flannel's cni-conf.json, to make that list of; empty = the plain one",
        ours=True,
    ),
    Flag("node-name", "str", "", "this node's name (else $NODE_NAME); with Kubernetes its Node's", ours=True),
    Flag("live-settings", "str", "", f"JSON file of flags that change while we run: {', '.join(LIVE)}", ours=True),
    Flag("proc-sys-net", "str", "/proc/sys/net", "where /proc/sys/net is writable, in a container", ours=True),
    Flag("take-over", "bool", False, "take the record of our public IP over, whoever made it", ours=True),
    Flag("subnet-lease-ttl", "int", LEASE_TTL_S, "life of an etcd lease, in seconds", ours=True),
    Flag("log-level", "str", "info", "debug, info, warning or error", ours=True),
    Flag("log-format", "str", "auto", "console, json, or auto: console on a terminal", ours=True),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; `{self.prog} --help` lists the flags")


def parser(prog: str = "overlayd") -> argparse.ArgumentParser:
    """The flags, as Go's flag package takes them: -x, --x, --x=v, booleans alone or with =."""
    made = _Parser(
        prog=prog,
        allow_abbrev=False,
        description="VXLAN overlay agent, compatible with flanneld.",
        epilog=f"Each flag is also read from the environment: {ENV_PREFIX}ETCD_ENDPOINTS for --etcd-endpoints.",
    )
    for flag in FLAGS:
        options: dict[str, Any] = {"dest": flag.name, "default": None, "help": flag.text or f"refused: {flag.refuse}"}
        if flag.kind == "bool":
            options |= {"nargs": "?", "const": "true", "metavar": "BOOL"}
        elif flag.kind == "list":
            options |= {"action": "append", "metavar": "VALUE"}
        else:
            options |= {"metavar": "N" if flag.kind == "int" else "VALUE"}
        made.add_argument(f"-{flag.name}", f"--{flag.name}", **options)
    return made


def read_settings(
    arguments: Sequence[str], environ: Mapping[str, str], prog: str = "overlayd"
) -> tuple[Settings, bool]:
    """Settings, and whether only the version was asked for.

    Raises:
        SettingsError: one line naming the flag or variable, its value and what is allowed.
        SystemExit: after --help.
    """
    given = vars(parser(prog).parse_args(list(arguments)))
    values: dict[str, Any] = {}
    for flag in FLAGS:
        text, where = given[flag.name], f"--{flag.name}"
        if text is None:
            where = ENV_PREFIX + flag.name.upper().replace("-", "_")
            text = environ.get(where) or None
            text = [text] if text is not None and flag.kind == "list" else text
        value = flag.default if text is None else _value(flag, text, where)
        if flag.refuse and value != flag.default:
            raise SettingsError(f"{where}: {_shown(flag, value)} is refused: {flag.refuse}")
        values[flag.name] = value
    if not values["node-name"] and values["kube-subnet-mgr"]:
        values["node-name"] = environ.get("NODE_NAME", "")
    return _settings(values), values["version"]


def read_live(text: bytes, settings: Settings) -> Settings:
    """Settings with what --live-settings says now; what it does not name is as at the start.

    Raises:
        SettingsError: names the field, its value and what is allowed; a flag that cannot change live is said to be one.
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"not JSON: {str(error)[:100]}") from None
    if not isinstance(given, dict):
        raise SettingsError('it must be an object like {"log-level": "info"}')
    values: dict[str, Any] = {}
    for name, value in given.items():
        flag = next((flag for flag in FLAGS if flag.name == name), None)
        if flag is None or name not in LIVE:
            why = "there is no such flag" if flag is None else "it needs a restart: set it in the agent's arguments"
            raise SettingsError(f"{str(name)[:60]!a}: {why}; allowed here: {', '.join(LIVE)}")
        if type(value) is not (bool if flag.kind == "bool" else str):
            raise SettingsError(
                f"{name}: {str(value)[:60]!a} must be {'true or false' if flag.kind == 'bool' else 'a string'}"
            )
        if name == "log-level" and value not in LOG_LEVELS:
            raise SettingsError(f"log-level: {str(value)[:60]!a} must be {', '.join(LOG_LEVELS)}")
        values[name] = value
    return replace(
        settings,
        log_level=values.get("log-level", settings.log_level),
        ip_masq=values.get("ip-masq", settings.ip_masq),
        fully_random=not values.get("ip-masq-fully-random-disable", not settings.fully_random),
        forward_rules=values.get("iptables-forward-rules", settings.forward_rules),
    )


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """FLANNELD_ names that mean nothing: a typing error, most likely."""
    known = {ENV_PREFIX + flag.name.upper().replace("-", "_") for flag in FLAGS}
    return sorted(name for name in environ if name.startswith(ENV_PREFIX) and name not in known)


def _value(flag: Flag, text: Any, where: str) -> Any:
    if flag.kind == "list":
        return tuple(text)
    if flag.kind == "int":
        try:
            return int(text)
        except ValueError:
            raise SettingsError(f"{where}: {text!r} must be a whole number") from None
    if flag.kind == "bool":
        if text.lower() in ("1", "t", "true"):
            return True
        if text.lower() in ("0", "f", "false"):
            return False
        raise SettingsError(f"{where}: {text!r} must be true or false")
    return text


def _shown(flag: Flag, value: object) -> str:
    return "(not shown)" if flag.kind == "password" else repr(value)


def _settings(values: Mapping[str, Any]) -> Settings:
    def check(name: str, good: Callable[[Any], bool], allowed: str) -> Any:
        if not good(values[name]):
            raise SettingsError(f"--{name}: {values[name]!r} must be {allowed}")
        return values[name]

    for pattern in values["iface-regex"]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise SettingsError(f"--iface-regex: {pattern!r} is not a regular expression: {error}") from None
    for name in ("run-dir", "subnet-file", "net-config-path", "proc-sys-net"):
        check(name, os.path.isabs, "an absolute path")
    for name in ("cni-conf-dir", "cni-data-dir", "cni-conf-template", "live-settings"):
        check(name, lambda path: not path or os.path.isabs(path), "an absolute path, or empty")
    longest = 253 if values["kube-subnet-mgr"] else 63
    check(
        "node-name",
        lambda text: re.fullmatch(rf"[A-Za-z0-9._-]{{0,{longest}}}", text) is not None,
        f"a host name, at most {longest} long",
    )
    if values["kube-subnet-mgr"] and not values["node-name"]:
        raise SettingsError(
            "--kube-subnet-mgr: which Node is this? set NODE_NAME (in a DaemonSet: fieldRef spec.nodeName) or --node-name"
        )
    try:
        Names.of(values["kube-annotation-prefix"])
    except ValueError as error:
        raise SettingsError(f"--kube-annotation-prefix: {error}") from None
    check("log-level", lambda level: level in LOG_LEVELS, ", ".join(LOG_LEVELS))
    check("log-format", lambda kind: kind in ("auto", "console", "json"), "console, json or auto")
    check("healthz-port", lambda port: 0 <= port <= 65535, "from 0 to 65535")
    endpoints = tuple(part.strip() for part in values["etcd-endpoints"].split(",") if part.strip())
    if not endpoints:
        raise SettingsError("--etcd-endpoints: empty; give one like http://127.0.0.1:2379")
    if bool(values["etcd-username"]) != bool(values["etcd-password"]):
        raise SettingsError("--etcd-username and --etcd-password: give both or neither")
    return Settings(
        etcd_endpoints=endpoints,
        etcd_prefix=check("etcd-prefix", lambda text: text.strip("/") != "", "a path like /coreos.com/network"),
        etcd_keyfile=values["etcd-keyfile"],
        etcd_certfile=values["etcd-certfile"],
        etcd_cafile=values["etcd-cafile"],
        etcd_username=values["etcd-username"],
        etcd_password=values["etcd-password"],
        iface=values["iface"],
        iface_regex=values["iface-regex"],
        iface_can_reach=_address(values, "iface-can-reach"),
        public_ip=_address(values, "public-ip"),
        subnet_file=values["subnet-file"],
        renew_margin_min=check("subnet-lease-renew-margin", lambda n: 1 <= n <= 1439, "from 1 to 1439 minutes"),
        lease_ttl_s=check("subnet-lease-ttl", lambda n: 5 <= n <= 9_000_000, "from 5 to 9000000 seconds"),
        ip_masq=values["ip-masq"],
        fully_random=not values["ip-masq-fully-random-disable"],
        forward_rules=values["iptables-forward-rules"],
        healthz_ip=values["healthz-ip"],
        healthz_port=values["healthz-port"],
        run_dir=values["run-dir"],
        cni_conf_dir=values["cni-conf-dir"],
        cni_data_dir=values["cni-data-dir"],
        cni_conf_template=values["cni-conf-template"],
        node_name=values["node-name"],
        kube=values["kube-subnet-mgr"],
        kube_api_url=values["kube-api-url"],
        kubeconfig=values["kubeconfig-file"],
        annotation_prefix=values["kube-annotation-prefix"],
        net_config_path=values["net-config-path"],
        tell_condition=values["set-node-network-unavailable"],
        live_settings=values["live-settings"],
        proc_sys_net=values["proc-sys-net"].rstrip("/"),
        take_over=values["take-over"],
        log_level="debug" if values["v"] > 0 else values["log-level"],
        log_format=values["log-format"],
    )


def _address(values: Mapping[str, Any], name: str) -> int:
    text = values[name]
    if not text:
        return 0
    try:
        return ip_number(text, 4)
    except ValueError:
        raise SettingsError(f"--{name}: {text!r} must be an IPv4 address") from None
