"""The flags, and the way they are written: Go's, as flanneld takes them. Pure.

Source: flannel main.go (names, defaults), Go's package flag (-x, --x, -x=v, -x v; booleans alone or with =),
pkg/util/flagutil (the environment). Not argparse: it knows neither -long names nor booleans of that kind, and costs each
agent 1 MiB and 10 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lease.records.annotations import DEFAULT_PREFIX

ENV_PREFIX = "FLANNELD_"
DEFAULT_SUBNET_FILE = "/run/flannel/subnet.env"
DEFAULT_RUN_DIR = "/run/overlay"
DEFAULT_CNI_CONF_DIR = "/etc/cni/net.d"
LIVE = (
    "log-level", "ip-masq", "ip-masq-fully-random-disable", "iptables-forward-rules", "underlay-cidr", "vxlan-guard",
    "pod-antispoof", "pod-lift", "network-policy", "cluster-network-policy", "groups", "probes",
)  # fmt: skip
"""Flags that --live-settings may hold."""
LEASE_TTL_S = 86_400
"""flannel's: 24 hours (pkg/subnet/etcd/local_manager.go)."""
HELP = ("h", "help")


class FlagError(ValueError):
    """The command line cannot be read: says where."""


class Flag(NamedTuple):
    """One flag. kind: str, int, bool, list or password; refuse: why a value other than the default is refused."""

    name: str
    kind: str
    default: Any
    text: str
    refuse: str = ""
    ours: bool = False


FLAGS = (
    Flag(
        "etcd-endpoints",
        "str",
        "http://127.0.0.1:4001,http://127.0.0.1:2379",
        "etcd servers, comma-separated; one that does not answer is passed over",
    ),
    Flag("etcd-prefix", "str", "/coreos.com/network", "where the network's keys stand"),
    Flag("etcd-keyfile", "str", "", "client key for TLS"),
    Flag("etcd-certfile", "str", "", "client certificate for TLS"),
    Flag(
        "etcd-cafile",
        "str",
        "",
        "CA that signed etcd's certificate; alone it is enough for https:// endpoints; read anew for each connection",
    ),
    Flag("etcd-username", "str", "", "etcd user"),
    Flag("etcd-password", "password", "", "its password; better given as FLANNELD_ETCD_PASSWORD"),
    Flag("iface", "list", (), "underlay interface, by name or address; repeatable, first match wins"),
    Flag("iface-regex", "list", (), "the same by a regular expression over addresses, then names; after all --iface"),
    Flag("iface-can-reach", "str", "", "underlay interface and address: those that route to this address"),
    Flag("public-ip", "str", "", "address that peers send to; one that is not local is advertised only"),
    Flag("public-ipv6", "str", "", "the same of IPv6"),
    Flag(
        "subnet",
        "list",
        (),
        "etcd: the subnet this node is to have, of any length inside Network; of each family one; while another node has it"
        " this one waits, or keeps what it has",
        ours=True,
    ),
    Flag("subnet-file", "str", DEFAULT_SUBNET_FILE, "where subnet.env is written, as flannel writes it"),
    Flag(
        "subnet-lease-renew-margin",
        "int",
        60,
        "minutes before its end at which a lease is renewed at the latest (it is renewed hourly)",
    ),
    Flag("ip-masq", "bool", False, "masquerade traffic that leaves the pod network"),
    Flag("ip-masq-fully-random-disable", "bool", False, "masquerade without fully random ports"),
    Flag("iptables-forward-rules", "bool", True, "accept forwarded pod traffic (by nftables)"),
    Flag("iptables-resync", "int", 5, "accepted; our rules are watched, not polled"),
    Flag("healthz-ip", "str", "0.0.0.0", "address of /healthz, /readyz and /metrics"),  # noqa: S104
    Flag("healthz-port", "int", 0, "their port; 0 = off"),
    Flag("version", "bool", False, "print the version and exit"),
    Flag("v", "int", 0, "above 0: log level debug"),
    Flag("ip-blackhole-route", "bool", False, "", "there are no blackhole routes here"),
    Flag("kube-subnet-mgr", "bool", False, "take the subnet from this Node's podCIDR, peers from Kubernetes, not etcd"),
    Flag("kube-api-url", "str", "", "the API server; else --kubeconfig-file, else the pod's service account"),
    Flag("kubeconfig-file", "str", "", "kubeconfig with API server and credentials"),
    Flag("kube-annotation-prefix", "str", DEFAULT_PREFIX, "what the Node annotations' names begin with"),
    Flag(
        "net-config-path",
        "str",
        "/etc/kube-flannel/net-conf.json",
        "the network config, with --kube-subnet-mgr; a change takes effect live",
    ),
    Flag(
        "set-node-network-unavailable",
        "bool",
        True,
        "set the Node's condition NetworkUnavailable to False once the datapath is in place",
    ),
    Flag("vmodule", "str", "", "", "use --log-level"),
    Flag("log_backtrace_at", "str", "", "", "use --log-level"),
    Flag("run-dir", "str", DEFAULT_RUN_DIR, "all else that the agent writes; one agent each", ours=True),
    Flag("cni-conf-dir", "str", DEFAULT_CNI_CONF_DIR, "where the CNI network list is written; empty = none", ours=True),
    Flag("cni-results-dir", "str", "/var/lib/cni/results", "where CNI's library keeps what pods were given", ours=True),
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
    Flag(
        "underlay-cidr",
        "list",
        (),
        "where the addresses of peers must lie (PublicIP, and OverlaySource where a record has one), comma-separated or"
        " repeated; others are refused; none = anywhere",
        ours=True,
    ),
    Flag(
        "vxlan-guard",
        "bool",
        True,
        "drop VXLAN of our VNI from addresses of no peer, and what pods send to its port on any node",
        ours=True,
    ),
    Flag(
        "pod-antispoof",
        "bool",
        True,
        "let each pod of our bridge send from its own addresses alone: IPv4, ARP, IPv6, neighbour discovery, MAC",
        ours=True,
    ),
    Flag(
        "pod-lift",
        "str",
        "auto",
        "give frames between pods of this node to the node, which forwards them, so that Services and policies see them:"
        " on, off, or auto (where there are policies, or Services without br_netfilter)",
        ours=True,
    ),
    Flag(
        "network-policy",
        "bool",
        True,
        "enforce NetworkPolicies: those of the Kubernetes API, or of --policy-dir",
        ours=True,
    ),
    Flag(
        "cluster-network-policy",
        "bool",
        False,
        "enforce ClusterNetworkPolicies (policy.networking.k8s.io) as well, where NetworkPolicies are",
        ours=True,
    ),
    Flag(
        "groups",
        "str",
        "off",
        "let pods of different groups talk only as Contracts say; a pod without the label overlay.network/group is in a"
        " group by: one (all in one), namespace, deployment",
        ours=True,
    ),
    Flag(
        "policy-dir",
        "str",
        "",
        "without Kubernetes: folder of YAML files with policies (NetworkPolicy, ClusterNetworkPolicy, Contract), Namespaces"
        " and Pods",
        ours=True,
    ),
    Flag(
        "ask-secret-file",
        "str",
        "",
        "file with a secret that all nodes share: with it agents ask each other (overlay trace, overlay status --cluster)",
        ours=True,
    ),
    Flag(
        "ask-port", "int", 8473, "TCP port, at the VTEP and the underlay's address, where they are answered", ours=True
    ),
    Flag(
        "page",
        "str",
        "",
        "ADDRESS:PORT where the page is served, like 127.0.0.1:8474 (`overlay page` says how to open it); empty = nowhere",
        ours=True,
    ),
    Flag(
        "probes",
        "bool",
        True,
        "ask each peer now and then whether it answers (ICMP echo, through the tunnel and beside it), by some packets a"
        " second in all",
        ours=True,
    ),
    Flag(
        "wireguard-key-file",
        "str",
        "",
        "this node's private key, made where there is none (else $WIREGUARD_KEY_FILE, else wgkey beside --subnet-file)",
        ours=True,
    ),
    Flag(
        "take-over",
        "bool",
        False,
        "take the record of our public IP over, whoever made it; counts for the first lease only",
        ours=True,
    ),
    Flag("subnet-lease-ttl", "int", LEASE_TTL_S, "life of an etcd lease, in seconds", ours=True),
    Flag("log-level", "str", "info", "debug, info, warning or error", ours=True),
    Flag("log-format", "str", "auto", "console, json, or auto: console on a terminal", ours=True),
)
_BY_NAME = {flag.name: flag for flag in FLAGS}


def variable(name: str) -> str:
    """The environment variable of a flag."""
    return ENV_PREFIX + name.upper().replace("-", "_")


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """What was given, by flag: text, or a list of texts for a repeatable one; "help" where that was asked for.

    Raises:
        FlagError: an unknown flag, a missing value, an argument that is no flag.
    """
    given: dict[str, Any] = {}
    left = iter(arguments)
    for argument in left:
        if not argument.startswith("-") or argument in ("-", "--"):
            raise FlagError(f"{argument!r} is not a flag (booleans are written with =, like --ip-masq=false)")
        name, equals, text = argument.removeprefix("-").removeprefix("-").partition("=")
        if name in HELP:
            given["help"] = True
            continue
        flag = _BY_NAME.get(name)
        if flag is None:
            raise FlagError(f"there is no flag {argument.partition('=')[0]!r}")
        if not equals:
            text = "true" if flag.kind == "bool" else next(left, "")
            if not text:
                raise FlagError(f"--{name}: needs a value, like --{name}=VALUE")
        if flag.kind == "list":
            given.setdefault(name, []).append(text)
        else:
            given[name] = text
    return given


_ETCD = tuple(flag.name for flag in FLAGS if flag.name.startswith("etcd-"))
_SAME_FLAGS = (
    "It takes all flags and variables of overlayd (`overlayd --help`); give those that the agent had. These matter:"
)
_RELEASE = f"""\
Give up this node's lease: its record in etcd is deleted, and other nodes stop sending here at once. Drain the node
and stop overlayd first. Device, routes and files stay: `overlay uninstall` removes them, afterwards. On Kubernetes
there is nothing to release. On a terminal it asks first. Exit status: 0 released, 1 not (the line says why), 2 a
wrong flag.

  --dry-run
        only say which record would be deleted
  --yes
        do not ask

{_SAME_FLAGS}"""
_UNINSTALL = f"""\
Remove all that overlayd made on this node: device, routes, nftables tables and rules, CNI list, subnet.env, files, on
Kubernetes the Node's annotations. RUNNING PODS LOSE THEIR NETWORK. Stop overlayd first; with etcd, `overlay release`
comes before. What flannel has again is left to it. After a failure it can be run again. On a terminal it asks first.
Exit status: 0 nothing is left, or nothing was there; 1 something could not be removed; 2 a wrong flag.

  --force
        also where the run directory has no trace of an agent
  --dry-run
        only say what would be removed
  --yes
        do not ask

{_SAME_FLAGS}"""
_ABOUT: dict[str, tuple[str, tuple[str, ...]]] = {
    "overlay release": (_RELEASE, ("run-dir", *_ETCD)),
    "overlay uninstall": (
        _UNINSTALL,
        (
            "run-dir",
            "cni-conf-dir",
            "subnet-file",
            "net-config-path",
            "kube-subnet-mgr",
            "kubeconfig-file",
            "node-name",
        ),
    ),
}
"""Of the operator's commands that take the agent's flags: what they do, and which flags matter to them."""


def help_text(prog: str) -> str:
    """What --help prints."""
    names = tuple(flag.name for flag in FLAGS)
    about, shown = _ABOUT.get(prog, ("VXLAN overlay agent, compatible with flanneld.", names))
    lines = [f"usage: {prog} [--FLAG=VALUE ...]", "", about, ""]
    for flag in (flag for flag in FLAGS if flag.name in shown):
        value = "" if flag.kind == "bool" else "=N" if flag.kind == "int" else "=VALUE"
        default = "" if flag.kind == "list" or flag.default == "" or flag.refuse else f" ({flag.default})"
        if flag.kind == "bool":
            default = default.lower()
        lines.append(f"  --{flag.name}{value}")
        lines.append(f"        {flag.text or f'refused: {flag.refuse}'}{default}")
    lines += ["", f"Each flag is also read from the environment: {variable('etcd-endpoints')} for --etcd-endpoints."]
    return "\n".join(lines) + "\n"
