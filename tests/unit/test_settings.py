"""flanneld's flags and environment, with flanneld's meaning or a clear refusal."""

import re
from pathlib import Path

import pytest

from lease.endpoint import shown
from lease.etcd.client import EtcdClient, EtcdSettings, EtcdSettingsError
from lease.model import ip_number
from overlay.cli.reference import rewritten
from overlay.settings.files import check_files
from overlay.settings.flags import FLAGS
from overlay.settings.settings import Settings, SettingsError, read_settings, unknown_variables

FLANNELD = [
    "etcd-endpoints",
    "etcd-prefix",
    "etcd-keyfile",
    "etcd-certfile",
    "etcd-cafile",
    "etcd-username",
    "etcd-password",
    "iface",
    "iface-regex",
    "iface-can-reach",
    "subnet-file",
    "public-ip",
    "public-ipv6",
    "subnet-lease-renew-margin",
    "ip-masq",
    "ip-masq-fully-random-disable",
    "kube-subnet-mgr",
    "kube-api-url",
    "kubeconfig-file",
    "kube-annotation-prefix",
    "version",
    "healthz-ip",
    "healthz-port",
    "iptables-resync",
    "iptables-forward-rules",
    "ip-blackhole-route",
    "net-config-path",
    "set-node-network-unavailable",
    "v",
    "vmodule",
    "log_backtrace_at",
]


def read(*arguments: str, **environ: str) -> Settings:
    return read_settings(arguments, environ)[0]


def test_every_flag_of_flanneld_is_known():
    assert set(FLANNELD) <= {flag.name for flag in FLAGS}


def test_defaults_are_flannels():
    settings = read()
    assert settings.etcd_endpoints == ("http://127.0.0.1:4001", "http://127.0.0.1:2379")
    assert settings.etcd_prefix == "/coreos.com/network"
    assert settings.subnet_file == "/run/flannel/subnet.env"
    assert (settings.ip_masq, settings.fully_random, settings.forward_rules) == (False, True, True)
    assert (settings.renew_margin_min, settings.lease_ttl_s) == (60, 86_400)
    assert settings.healthz_port == 0


@pytest.mark.parametrize("form", [["-iface=eth0"], ["--iface=eth0"], ["-iface", "eth0"], ["--iface", "eth0"]])
def test_gos_ways_to_write_a_flag(form):
    assert read(*form).iface == ("eth0",)


@pytest.mark.parametrize(
    ("form", "value"),
    [
        ("-ip-masq", True),
        ("--ip-masq=true", True),
        ("-ip-masq=1", True),
        ("--ip-masq=false", False),
        ("-ip-masq=F", False),
    ],
)
def test_booleans(form, value):
    assert read(form).ip_masq is value


def test_repeatable_flags_keep_their_order():
    settings = read("--iface=eth1", "--iface-regex=10\\.", "-iface=eth0")
    assert settings.iface == ("eth1", "eth0")
    assert settings.iface_regex == ("10\\.",)


def test_the_environment_is_read_and_the_command_line_wins():
    settings = read(
        "--etcd-prefix=/a",
        FLANNELD_ETCD_PREFIX="/b",
        FLANNELD_IP_MASQ="true",
        FLANNELD_IFACE="eth9",
        FLANNELD_PUBLIC_IP="",
    )
    assert settings.etcd_prefix == "/a"
    assert settings.ip_masq
    assert settings.iface == ("eth9",)
    assert settings.public_ip == 0


def test_the_variables_of_distributions_are_flags_before_the_command_lines():
    settings = read(
        "--etcd-prefix=/a",
        FLANNEL_ETCD_ENDPOINTS="http://10.0.0.1:2379",
        FLANNEL_ETCD="http://older:4001",
        FLANNEL_ETCD_KEY="/atomic.io/network",
        FLANNEL_OPTIONS="-iface=eth1 -ip-masq --subnet-file='/run/a b.env'",
        FLANNELD_IFACE="eth9",
    )
    assert settings.etcd_endpoints == ("http://10.0.0.1:2379",)
    assert settings.etcd_prefix == "/a", "the command line wins"
    assert (settings.iface, settings.ip_masq, settings.subnet_file) == (("eth1",), True, "/run/a b.env")
    assert read(FLANNEL_ETCD="http://older:4001").etcd_endpoints == ("http://older:4001",)


def test_addresses_endpoints_and_levels():
    settings = read("--etcd-endpoints= http://a:1 ,http://b:2", "--public-ip=203.0.113.9", "-v=2")
    assert settings.etcd_endpoints == ("http://a:1", "http://b:2")
    assert settings.public_ip == ip_number("203.0.113.9", 4)
    assert settings.log_level == "debug"


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (["--no-such-flag"], {}, ["no-such-flag"]),
        ([], {"FLANNEL_OPTIONS": "--iface='eth0"}, ["FLANNEL_OPTIONS", "No closing quotation"]),
        ([], {"FLANNEL_OPTIONS": "--no-such-flag"}, ["no-such-flag"]),
        (["stray"], {}, ["stray"]),
        (["--healthz-port=x"], {}, ["--healthz-port", "'x'", "whole number"]),
        (["--healthz-port=70000"], {}, ["--healthz-port", "65535"]),
        (["--ip-masq=maybe"], {}, ["--ip-masq", "maybe", "true or false"]),
        ([], {"FLANNELD_IP_MASQ": "maybe"}, ["FLANNELD_IP_MASQ", "maybe"]),
        (["--public-ip=eth0"], {}, ["--public-ip", "eth0", "IPv4"]),
        (["--iface-regex=("], {}, ["--iface-regex", "regular expression"]),
        (["--iface-regex=a{4294967296}"], {}, ["--iface-regex", "a{4294967296}", "regular expression"]),
        ([f"--iface-regex={'(' * 3000}{')' * 3000}"], {}, ["--iface-regex", "regular expression"]),
        (["--etcd-prefix=/\udcff"], {}, ["--etcd-prefix", "UTF-8"]),
        (["--iface=eth0", "--iface=\udcff"], {}, ["--iface", "UTF-8"]),
        ([], {"FLANNELD_NODE_NAME": "\udcff"}, ["FLANNELD_NODE_NAME", "UTF-8"]),
        (["--etcd-endpoints=http://root:se/c,secret@10.0.0.1:2379"], {}, ["--etcd-endpoints", "--etcd-password"]),
        (["--kube-api-url=https://u:secret@host"], {}, ["--kube-api-url", "--kubeconfig-file"]),
        (["--subnet-lease-renew-margin=1440"], {}, ["1439"]),
        (["--subnet-file=relative"], {}, ["--subnet-file", "absolute"]),
        (["--node-name=a b"], {}, ["--node-name"]),
        (["--etcd-username=u"], {}, ["--etcd-password"]),
        (["--etcd-endpoints=,"], {}, ["--etcd-endpoints"]),
        (["--etcd-prefix=/"], {}, ["--etcd-prefix"]),
        (["--kube-subnet-mgr"], {}, ["--kube-subnet-mgr", "NODE_NAME", "--node-name"]),
        ([], {"FLANNELD_KUBE_SUBNET_MGR": "true"}, ["NODE_NAME"]),
        (["--kube-annotation-prefix=a/b/c"], {}, ["--kube-annotation-prefix", "a/b/c"]),
        (["--net-config-path=relative"], {}, ["--net-config-path", "absolute"]),
        (["--ip-blackhole-route"], {}, ["refused", "blackhole"]),
        (["--public-ipv6=192.168.1.1"], {}, ["--public-ipv6", "IPv6 address"]),
    ],
)
def test_refused_in_one_line_that_names_flag_value_and_what_is_allowed(arguments, environ, words):
    with pytest.raises(SettingsError) as caught:
        read_settings(arguments, environ)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://10.0.0.1:2379", "http://10.0.0.1:2379"),
        ("https://root:secret@10.0.0.1:2379", "https://(not shown)@10.0.0.1:2379"),
        ("https://root:sec@ret@h", "https://(not shown)@h"),
        ("root:secret@h:1", "(not shown)@h:1"),
        ("//secret@h", "//(not shown)@h"),
        ("http://u:sec/ret@h:1", "http://(not shown)@h:1"),
        ("http://u:sec ret@h:1", "http://(not shown)@h:1"),
    ],
)
def test_an_address_is_shown_without_its_password(address, words):
    assert shown(address) == words
    if words != address:
        with pytest.raises(EtcdSettingsError) as caught:
            EtcdClient(EtcdSettings((address,)))
        assert "sec" not in str(caught.value)


def test_a_password_is_never_shown():
    assert "hunter2" not in repr(read("--etcd-username=u", "--etcd-password=hunter2"))


def test_typing_errors_in_the_environment_are_found():
    assert unknown_variables({"FLANNELD_IFCE": "x", "FLANNELD_IFACE": "y", "PATH": ""}) == ["FLANNELD_IFCE"]


def test_the_reference_is_made_from_the_flags():
    """Where this fails: make reference."""
    page = (Path(__file__).parents[2] / "docs/reference.md").read_text()
    assert rewritten(page) == page
    for flag in FLAGS:
        assert f"| `--{flag.name}`" in page, flag.name
    with pytest.raises(ValueError, match="lacks the lines"):
        rewritten("# a page")


@pytest.mark.parametrize(
    ("prog", "words", "none"),
    [
        ("overlayd", ["compatible with flanneld", "--vxlan-guard", "(true)", "(false)"], ["--force"]),
        (
            "overlay release",
            ["Give up this node's lease", "--etcd-endpoints", "Exit status"],
            ["--vxlan-guard", "--force"],
        ),
        ("overlay uninstall", ["LOSE THEIR NETWORK", "--force", "--run-dir", "Exit status"], ["--vxlan-guard"]),
    ],
)
def test_help_says_what_the_command_does_and_what_matters_to_it(prog, words, none, capsys):
    with pytest.raises(SystemExit) as ended:
        read_settings(["--help"], {}, prog)
    assert ended.value.code in (0, None)
    shown = capsys.readouterr().out
    assert all(word in shown for word in words)
    assert not any(word in shown for word in none)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--etcd-cafile=/nowhere/ca.pem"], "--etcd-cafile: /nowhere/ca.pem: No such file"),
        (["--etcd-keyfile=/nowhere/key.pem"], "--etcd-keyfile: /nowhere/key.pem: No such file"),
        (["--etcd-certfile=/etc/hostname"], "--etcd-certfile and --etcd-keyfile: give both"),
        (
            ["--kube-subnet-mgr", "--node-name=n", "--kubeconfig-file=/nowhere"],
            "--kubeconfig-file: /nowhere: No such file",
        ),
        (["--run-dir=/etc/hostname"], "--run-dir: /etc/hostname must be a folder"),
        (["--cni-conf-dir=/etc/hostname"], "--cni-conf-dir: /etc/hostname must be a folder"),
        (["--subnet-file=/etc"], "--subnet-file: /etc is a folder"),
        (["--proc-sys-net=/etc"], "--proc-sys-net: /etc has no ipv4"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(flags, words):
    settings, _ = read_settings(flags, {})
    with pytest.raises(SettingsError) as caught:
        check_files(settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_may_come_later_are_waited_for():
    settings, _ = read_settings(
        ["--live-settings=/nowhere", "--cni-conf-template=/nowhere", "--net-config-path=/nowhere"], {}
    )
    check_files(settings)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--public-ip=0.0.0.0", "is in 0.0.0.0/8"),
        ("--public-ip=127.0.0.1", "is in 127.0.0.0/8"),
        ("--public-ip=224.0.0.1", "where no node's address can be"),
        ("--iface-can-reach=0.0.0.0", "--iface-can-reach"),
        ("--healthz-ip=foo", "--healthz-ip: 'foo' must be an address"),
        ("--iface=a-name-that-is-too-long", "at most 15 characters"),
    ],
)
def test_impossible_values_are_refused(flag, words):
    with pytest.raises(SettingsError, match=re.escape(words)):
        read_settings([flag], {})


def test_an_interface_may_be_named_by_a_long_address():
    assert read_settings(["--iface=255.255.255.254", "--healthz-ip=::"], {})[0].iface == ("255.255.255.254",)
