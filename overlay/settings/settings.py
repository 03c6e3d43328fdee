"""Flags, environment, files -> Settings (frozen).

flanneld's flags and FLANNELD_ names with flanneld's meaning wherever we have the feature, a refusal in one line where we
have not. Source: flannel main.go (flags), pkg/util/flagutil (environment).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lease.endpoint import LIKE, endpoint_parts
from lease.model import NO_NODE, Prefix, ip_number, prefix
from lease.records.annotations import DEFAULT_PREFIX, Names
from overlay.settings.distributions import OPTIONS, flags_of
from overlay.settings.flags import (
    DEFAULT_CNI_CONF_DIR,
    DEFAULT_RUN_DIR,
    DEFAULT_SUBNET_FILE,
    ENV_PREFIX,
    FLAGS,
    LEASE_TTL_S,
    LIVE,
    Flag,
    FlagError,
    help_text,
    parse,
    variable,
)

LOG_LEVELS = ("debug", "info", "warning", "error")
LIFTS = ("auto", "on", "off")
GROUPINGS = ("off", "one", "namespace", "deployment")


class SettingsError(ValueError):
    """A flag or variable is wrong: names it, its value and what is allowed."""


LONGEST_NAME = 15
"""Of an interface (IFNAMSIZ, include/uapi/linux/if.h)."""


class Settings(NamedTuple):
    """What the operator said. Paths may not exist yet; public_ip, public_ipv6: 0 where not given; iface_can_reach: family
    and address, None where not given."""

    etcd_endpoints: tuple[str, ...] = ("http://127.0.0.1:4001", "http://127.0.0.1:2379")
    etcd_prefix: str = "/coreos.com/network"
    etcd_keyfile: str = ""
    etcd_certfile: str = ""
    etcd_cafile: str = ""
    etcd_username: str = ""
    etcd_password: str = ""
    iface: tuple[str, ...] = ()
    iface_regex: tuple[str, ...] = ()
    iface_can_reach: tuple[int, int] | None = None
    public_ip: int = 0
    public_ipv6: int = 0
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
    cni_results_dir: str = "/var/lib/cni/results"
    cni_conf_template: str = ""
    node_name: str = ""
    kube: bool = False
    kube_api_url: str = ""
    kubeconfig: str = ""
    annotation_prefix: str = DEFAULT_PREFIX
    net_config_path: str = "/etc/kube-flannel/net-conf.json"
    set_condition: bool = True
    live_settings: str = ""
    proc_sys_net: str = "/proc/sys/net"
    underlay_cidrs: tuple[Prefix, ...] = ()
    vxlan_guard: bool = True
    pod_antispoof: bool = True
    pod_lift: str = "auto"
    network_policy: bool = True
    cluster_network_policy: bool = False
    groups: str = "off"
    policy_dir: str = ""
    probes: bool = True
    ask_secret_file: str = ""
    ask_port: int = 8473
    wireguard_key_file: str = "/run/flannel/wgkey"
    page: tuple[str, int] | None = None
    take_over: bool = False
    subnets: tuple[Prefix, ...] = ()
    """Those asked for, one of each family at most."""
    log_level: str = "info"
    log_format: str = "auto"

    @property
    def knows_policies(self) -> bool:
        """Whether there is anything that NetworkPolicies come from."""
        return self.kube or bool(self.policy_dir)

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in self._asdict().items() if name != "etcd_password")
        return f"Settings({', '.join(shown)})"

    def public_ip_of(self, family: int) -> int:
        """--public-ip or --public-ipv6, 0 where it is not given."""
        return self.public_ip if family == 4 else self.public_ipv6

    def underlay_cidrs_of(self, family: int) -> tuple[Prefix, ...]:
        """--underlay-cidr, those of a family."""
        return tuple(there for there in self.underlay_cidrs if there.family == family)

    def with_public_ip(self, family: int, address: int) -> Settings:
        """With another."""
        return self._replace(public_ip=address) if family == 4 else self._replace(public_ipv6=address)

    @property
    def renew_within_s(self) -> float:
        """Renew the lease at the latest after so long: its life less flannel's margin."""
        return max(self.lease_ttl_s - self.renew_margin_min * 60, self.lease_ttl_s / 3)


def read_settings(
    arguments: Sequence[str], environ: Mapping[str, str], prog: str = "overlayd"
) -> tuple[Settings, bool]:
    """Settings, and whether only the version was asked for.

    Raises:
        SettingsError: one line naming the flag or variable, its value and what is allowed.
        SystemExit: after --help.
    """
    try:
        before = flags_of(environ)
    except ValueError as error:
        raise SettingsError(f"{OPTIONS}: {environ[OPTIONS][:60]!r}: {error}; write flags as in a shell") from None
    try:
        given = parse(before) | parse(arguments)
    except FlagError as error:
        raise SettingsError(f"{error}; `{prog} --help` lists the flags") from None
    if "help" in given:
        sys.stdout.write(help_text(prog))
        raise SystemExit(0)
    values: dict[str, Any] = {}
    for flag in FLAGS:
        text, where = given.get(flag.name), f"--{flag.name}"
        if text is None:
            where = variable(flag.name)
            text = environ.get(where) or None
            text = [text] if text is not None and flag.kind == "list" else text
        value = flag.default if text is None else _value(flag, text, where)
        if flag.refuse and value != flag.default:
            raise SettingsError(f"{where}: {_shown(flag, value)} is refused: {flag.refuse}")
        values[flag.name] = value
    if not values["node-name"] and values["kube-subnet-mgr"]:
        values["node-name"] = environ.get("NODE_NAME", "")
    if not values["wireguard-key-file"]:
        beside = f"{os.path.dirname(values['subnet-file'])}/wgkey"
        values["wireguard-key-file"] = environ.get("WIREGUARD_KEY_FILE", "") or beside
    return _settings(values), values["version"]


_LIVE_KINDS: dict[str, tuple[type, str]] = {
    "bool": (bool, "true or false"),
    "str": (str, "a string"),
    "list": (list, 'a list like ["192.168.0.0/16"]'),
}


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
        kind, words = _LIVE_KINDS[flag.kind]
        if type(value) is not kind or (isinstance(value, list) and not all(type(one) is str for one in value)):
            raise SettingsError(f"{name}: {str(value)[:60]!a} must be {words}")
        if name == "log-level" and value not in LOG_LEVELS:
            raise SettingsError(f"log-level: {str(value)[:60]!a} must be one of {', '.join(LOG_LEVELS)}")
        if name == "pod-lift" and value not in LIFTS:
            raise SettingsError(f"pod-lift: {str(value)[:60]!a} must be one of {', '.join(LIFTS)}")
        if name == "groups" and value not in GROUPINGS:
            raise SettingsError(f"groups: {str(value)[:60]!a} must be one of {', '.join(GROUPINGS)}")
        values[name] = value
    cidrs = _prefixes(values, "underlay-cidr") if "underlay-cidr" in values else settings.underlay_cidrs
    return settings._replace(
        underlay_cidrs=cidrs,
        vxlan_guard=values.get("vxlan-guard", settings.vxlan_guard),
        pod_antispoof=values.get("pod-antispoof", settings.pod_antispoof),
        pod_lift=values.get("pod-lift", settings.pod_lift),
        network_policy=values.get("network-policy", settings.network_policy),
        groups=values.get("groups", settings.groups),
        cluster_network_policy=values.get("cluster-network-policy", settings.cluster_network_policy),
        probes=values.get("probes", settings.probes),
        log_level=values.get("log-level", settings.log_level),
        ip_masq=values.get("ip-masq", settings.ip_masq),
        fully_random=not values.get("ip-masq-fully-random-disable", not settings.fully_random),
        forward_rules=values.get("iptables-forward-rules", settings.forward_rules),
    )


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """FLANNELD_ names that mean nothing: a typing error, most likely."""
    known = {variable(flag.name) for flag in FLAGS}
    return sorted(name for name in environ if name.startswith(ENV_PREFIX) and name not in known)


def _value(flag: Flag, text: Any, where: str) -> Any:
    for one in text if flag.kind == "list" else (text,):
        try:
            one.encode()
        except UnicodeEncodeError:  # bytes that are no UTF-8 come as surrogates (PEP 383)
            raise SettingsError(f"{where}: its value is not UTF-8") from None
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


def _checker(values: Mapping[str, Any]) -> Callable[[str, Callable[[Any], bool], str], Any]:
    def check(name: str, good: Callable[[Any], bool], allowed: str) -> Any:
        if not good(values[name]):
            raise SettingsError(f"--{name}: {values[name]!r} must be {allowed}")
        return values[name]

    return check


def _checked_endpoints(values: Mapping[str, Any]) -> tuple[str, ...]:
    """etcd's endpoints, when everything else is as it must be, too. Raises SettingsError."""
    check = _checker(values)
    for pattern in values["iface-regex"]:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise SettingsError(f"--iface-regex: {pattern[:60]!r} is not a regular expression: {error}") from None
    for name in ("run-dir", "subnet-file", "net-config-path", "proc-sys-net", "cni-results-dir", "wireguard-key-file"):
        check(name, os.path.isabs, "an absolute path")
    if values["policy-dir"] and values["kube-subnet-mgr"]:
        raise SettingsError(
            "--policy-dir: with --kube-subnet-mgr policies are those of the Kubernetes API: leave it out"
        )
    for name in ("cni-conf-dir", "cni-data-dir", "cni-conf-template", "live-settings", "policy-dir"):
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
    check("log-level", lambda level: level in LOG_LEVELS, f"one of {', '.join(LOG_LEVELS)}")
    check("log-format", lambda kind: kind in ("auto", "console", "json"), "console, json or auto")
    check("healthz-ip", _is_address, "an address, like 0.0.0.0 or ::")
    for name in values["iface"]:
        if len(name) > LONGEST_NAME and not _is_address(name):
            raise SettingsError(
                f"--iface: {name[:60]!r} must be an address, or a name of at most {LONGEST_NAME} characters"
            )
    check("healthz-port", lambda port: 0 <= port <= 65535, "from 0 to 65535")
    if "@" in values["etcd-endpoints"]:
        raise SettingsError(
            "--etcd-endpoints: give credentials by --etcd-username and --etcd-password, not in an address"
        )
    if "@" in values["kube-api-url"]:  # not shown: a password may stand before it
        raise SettingsError("--kube-api-url: give credentials by --kubeconfig-file, not in the address")
    endpoints = tuple(part.strip() for part in values["etcd-endpoints"].split(",") if part.strip())
    if not endpoints:
        raise SettingsError("--etcd-endpoints: empty; give one like http://127.0.0.1:2379")
    for endpoint in endpoints:
        if endpoint_parts(endpoint) is None:
            raise SettingsError(f"--etcd-endpoints: {endpoint[:80]!r} {LIKE}")
    if bool(values["etcd-username"]) != bool(values["etcd-password"]):
        raise SettingsError("--etcd-username and --etcd-password: give both or neither")
    return endpoints


def _settings(values: Mapping[str, Any]) -> Settings:
    endpoints, check = _checked_endpoints(values), _checker(values)
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
        iface_can_reach=_can_reach(values),
        public_ip=_address(values, "public-ip", 4),
        public_ipv6=_address(values, "public-ipv6", 6),
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
        cni_results_dir=values["cni-results-dir"],
        cni_conf_template=values["cni-conf-template"],
        node_name=values["node-name"],
        kube=values["kube-subnet-mgr"],
        kube_api_url=values["kube-api-url"],
        kubeconfig=values["kubeconfig-file"],
        annotation_prefix=values["kube-annotation-prefix"],
        net_config_path=values["net-config-path"],
        set_condition=values["set-node-network-unavailable"],
        live_settings=values["live-settings"],
        proc_sys_net=values["proc-sys-net"].rstrip("/"),
        underlay_cidrs=_prefixes(values, "underlay-cidr"),
        vxlan_guard=values["vxlan-guard"],
        pod_antispoof=values["pod-antispoof"],
        pod_lift=check("pod-lift", lambda text: text in LIFTS, f"one of {', '.join(LIFTS)}"),
        network_policy=values["network-policy"],
        groups=check("groups", lambda text: text in GROUPINGS, f"one of {', '.join(GROUPINGS)}"),
        cluster_network_policy=values["cluster-network-policy"],
        policy_dir=values["policy-dir"],
        probes=values["probes"],
        ask_secret_file=values["ask-secret-file"],
        ask_port=check("ask-port", lambda n: 1 <= n <= 65535, "a TCP port from 1 to 65535"),
        wireguard_key_file=values["wireguard-key-file"],
        page=_page(values),
        take_over=values["take-over"],
        subnets=_subnets(values),
        log_level="debug" if values["v"] > 0 else values["log-level"],
        log_format=values["log-format"],
    )


def _page(values: Mapping[str, Any]) -> tuple[str, int] | None:
    text = values["page"]
    if not text:
        return None
    host, _, port = text.rpartition(":")
    if not _is_address(host) or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise SettingsError(f"--page: {text[:60]!r} must be ADDRESS:PORT, like 127.0.0.1:8474")
    if not host.startswith("127.") and not values["ask-secret-file"]:
        raise SettingsError("--page: at an address that others reach it needs a token, by --ask-secret-file")
    return host, int(port)


def _prefixes(values: Mapping[str, Any], name: str) -> tuple[Prefix, ...]:
    found = []
    for text in ",".join(values[name]).split(","):
        if not text.strip():
            continue
        try:
            there = prefix(text.strip())
        except ValueError:
            there = None
        if there is None:
            raise SettingsError(f"--{name}: {text[:60]!r} must be a prefix like 192.168.0.0/16 or fd00:1::/48")
        found.append(there)
    return tuple(found)


def _subnets(values: Mapping[str, Any]) -> tuple[Prefix, ...]:
    found = _prefixes(values, "subnet")
    if found and values["kube-subnet-mgr"]:
        raise SettingsError("--subnet: on Kubernetes a node's subnet is its podCIDR, which the cluster gives")
    if len({each.family for each in found}) < len(found):
        raise SettingsError(f"--subnet: one of each family, not {', '.join(map(str, found))}")
    return found


def _is_address(text: str) -> bool:
    for family in (4, 6):
        try:
            ip_number(text, family)
        except ValueError:
            continue
        return True
    return False


def _can_reach(values: Mapping[str, Any]) -> tuple[int, int] | None:
    text = values["iface-can-reach"]
    family = 6 if ":" in text else 4
    return (family, _address(values, "iface-can-reach", family)) if text else None


def _address(values: Mapping[str, Any], name: str, family: int) -> int:
    text = values[name]
    if not text:
        return 0
    try:
        found = ip_number(text, family)
    except ValueError:
        raise SettingsError(f"--{name}: {text!r} must be an IPv{family} address") from None
    for there in NO_NODE[family]:
        if there.holds(found):
            raise SettingsError(f"--{name}: {text} is in {there}, where no node's address can be")
    return found
