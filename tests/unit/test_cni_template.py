"""flannel's cni-conf.json rendered as a list that needs no flannel plugin; plugins put in place; live settings."""

from __future__ import annotations

import json

import pytest

from lease.model import prefix
from overlay.cni import lists as cni
from overlay.cni import plugins
from overlay.settings.settings import SettingsError, read_live, read_settings
from tests.support.world import CNI_CONF

NETWORK, SUBNET = prefix("10.244.0.0/16"), prefix("10.244.7.0/24")
PLAIN = cni.network_list([cni.PodNetwork(NETWORK, SUBNET)], 1450, "cni0", "")


def render(template: object, ip_masq: bool = True) -> dict:
    text = template if isinstance(template, str) else json.dumps(template)
    return dict(json.loads(cni.render_list(text.encode(), PLAIN, 1450, ip_masq)))


def test_flannels_own_list():
    found = render(CNI_CONF)
    assert (found["name"], found["cniVersion"]) == ("cbr0", "0.3.1")
    assert found["plugins"][0] == {
        "type": "bridge", "bridge": "cni0", "mtu": 1450, "ipMasq": False, "isGateway": True,
        "hairpinMode": True, "isDefaultGateway": True,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.7.0/24"}]], "routes": [{"dst": "10.244.0.0/16"}]},
    }  # fmt: skip
    assert found["plugins"][1] == {"type": "portmap", "capabilities": {"portMappings": True}}


def test_without_ip_masq_the_bridge_masquerades_as_with_flannel():
    assert render(CNI_CONF, ip_masq=False)["plugins"][0]["ipMasq"] is True


def test_what_an_operator_set_is_kept():
    entry = {
        "type": "flannel", "subnetFile": "/x", "dataDir": "/y",
        "delegate": {"mtu": 9000, "bridge": "br1", "ipMasq": True, "vlan": 5, "isGateway": False},
        "ipam": {"routes": [{"dst": "192.168.0.0/16"}], "dataDir": "/z"},
    }  # fmt: skip
    other = {"type": "bandwidth", "capabilities": {"bandwidth": True}}
    found = render({"cniVersion": "1.0.0", "name": "mine", "plugins": [entry, other], "disableCheck": True})
    assert (found["name"], found["cniVersion"], found["disableCheck"]) == ("mine", "1.0.0", True)
    bridge = found["plugins"][0]
    assert {key: bridge[key] for key in ("mtu", "bridge", "ipMasq", "vlan", "isGateway")} == {
        "mtu": 9000, "bridge": "br1", "ipMasq": True, "vlan": 5, "isGateway": False,
    }  # fmt: skip
    assert bridge["ipam"]["routes"] == [{"dst": "192.168.0.0/16"}, {"dst": "10.244.0.0/16"}]
    assert bridge["ipam"]["dataDir"] == "/z"
    assert "subnetFile" not in bridge
    assert found["plugins"][1] == other


def test_report_8_one_plugin_alone_is_a_list_of_one():
    single = {"name": "cbr0", "type": "flannel", "delegate": {"isDefaultGateway": True}}
    assert render(single) == render(
        {"name": "cbr0", "plugins": [{"type": "flannel", "delegate": {"isDefaultGateway": True}}]}
    )
    assert render({"type": "flannel", "cniVersion": "1.0.0"})["cniVersion"] == "1.0.0"
    with pytest.raises(ValueError, match="must be a list"):
        render({"name": "x"})


def test_report_8_the_delegates_of_multus_are_looked_into():
    flannel = {"type": "flannel", "delegate": {"hairpinMode": True}}
    found = render({"name": "multus", "type": "multus", "delegates": [flannel, {"type": "macvlan"}]})
    (multus,) = found["plugins"]
    assert multus["type"] == "multus"
    assert multus["delegates"] == [render({"plugins": [flannel]})["plugins"][0], {"type": "macvlan"}]
    nested = render({"type": "multus", "delegates": [{"name": "cbr0", "plugins": [flannel]}]})
    assert nested["plugins"][0]["delegates"][0]["plugins"][0]["type"] == "bridge"
    assert render({"type": "multus", "delegates": "rubbish"})["plugins"][0]["delegates"] == "rubbish"


def test_another_delegate_is_no_bridge():
    found = render({"plugins": [{"type": "flannel", "delegate": {"type": "ptp"}}]})["plugins"][0]
    assert found["type"] == "ptp"
    assert "bridge" not in found


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{", "not JSON"),
        ("[]", "plugins"),
        ({"plugins": {}}, "plugins"),
        ({"plugins": ["x"]}, "plugins"),
        ({"plugins": [{"type": "flannel", "delegate": {"name": "x"}}]}, "delegate.name"),
        ({"plugins": [{"type": "flannel", "delegate": {"ipam": {}}}]}, "delegate.ipam"),
        ({"plugins": [{"type": "flannel", "delegate": []}]}, None),
        ({"plugins": [{"type": "flannel", "delegate": [1]}]}, "delegate"),
        ({"plugins": [{"type": "flannel", "ipam": {"routes": {"a": 1}}}]}, "routes"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(template, words):
    if words is None:
        render(template)  # empty means absent, as to Go
        return
    with pytest.raises(ValueError, match=words):
        render(template)


def test_an_old_list_tells_its_subnet(tmp_path):
    path = tmp_path / "list"
    assert cni.listed_subnet(str(path), 4) is None
    path.write_text(PLAIN)
    assert cni.listed_subnet(str(path), 4) == SUBNET
    for text in ("{", "[]", CNI_CONF, '{"plugins":[{"ipam":{"ranges":[[{"subnet":"x"}]]}}]}', '{"plugins":[1]}'):
        path.write_text(text)
        assert cni.listed_subnet(str(path), 4) is None


def test_plugins_are_put_where_the_host_has_none(tmp_path):
    source, target = tmp_path / "from", tmp_path / "deep" / "to"
    source.mkdir()
    for name in plugins.PLUGINS:
        (source / name).write_text(f"ours {name}")
        (source / name).chmod(0o755)
    target.mkdir(parents=True)
    (target / "bridge").write_text("the host's")
    (target / "bridge").chmod(0o755)
    done = plugins.install_plugins(str(source), str(target))
    assert "stays" in done["bridge"]
    assert (target / "bridge").read_text() == "the host's"
    assert sorted(path.name for path in target.iterdir()) == sorted(plugins.PLUGINS)
    assert (target / "portmap").stat().st_mode & 0o777 == 0o755
    (source / "portmap").unlink()
    (target / "portmap").unlink()
    with pytest.raises(OSError, match="portmap"):
        plugins.install_plugins(str(source), str(target))
    assert not [path for path in target.iterdir() if path.name.startswith(".")]


def settings():
    return read_settings(["--ip-masq"], {})[0]


def test_live_settings_are_laid_over_the_flags():
    found = read_live(b'{"log-level":"debug","ip-masq-fully-random-disable":true}', settings())
    assert (found.log_level, found.ip_masq, found.fully_random, found.forward_rules) == ("debug", True, False, True)
    assert read_live(b"{}", settings()) == settings()
    found = read_live(
        b'{"underlay-cidr":["192.168.0.0/16","10.0.0.0/8"],"vxlan-guard":false,"pod-antispoof":false}', settings()
    )
    assert list(map(str, found.underlay_cidrs)) == ["192.168.0.0/16", "10.0.0.0/8"]
    assert not found.vxlan_guard
    assert not found.pod_antispoof


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "must be an object"),
        (b'{"iface":"eth1"}', "needs a restart"),
        (b'{"nonsense":1}', "no such flag"),
        (b'{"ip-masq":"yes"}', "true or false"),
        (b'{"log-level":"loud"}', "debug, info, warning, error"),
        (b'{"log-level":3}', "a string"),
        (b'{"underlay-cidr":"10.0.0.0/8"}', "a list like"),
        (b'{"underlay-cidr":[7]}', "a list like"),
        (b'{"underlay-cidr":["10.0.0.0/40"]}', "underlay-cidr: '10.0.0.0/40' must be a prefix like"),
    ],
)
def test_live_settings_that_cannot_be_are_named(text, words):
    with pytest.raises(SettingsError, match=words):
        read_live(text, settings())


@pytest.mark.parametrize(
    ("name", "content", "preferred"),
    [
        ("05-bridge.conf", {"name": "b", "type": "bridge"}, True),
        ("05-bridge.conflist", {"name": "b", "plugins": [{"type": "bridge"}, {"type": "portmap"}]}, True),
        ("05-bridge.json", {"name": "b", "type": "ptp"}, True),
        ("11-bridge.conf", {"name": "b", "type": "bridge"}, False),
        ("05-bridge.bak", {"name": "b", "type": "bridge"}, False),
        ("05-odd.conf", {"type": []}, False),
        ("05-odd.conflist", {"plugins": [{"type": {}}]}, False),
        ("05-rubbish.conf", "{", False),  # no runtime takes it
        ("00-multus.conf", {"name": "m", "type": "multus", "delegates": []}, False),
        ("05-flannel.conflist", {"name": "cbr0", "plugins": [{"type": "flannel"}]}, False),  # by subnet.env, ours
        ("05-own.conflist", json.loads(PLAIN), False),
    ],
)
def test_a_list_that_a_runtime_takes_before_ours(tmp_path, name, content, preferred):
    (tmp_path / cni.CONFLIST).write_text(PLAIN)
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert cni.preferred(str(tmp_path), SUBNET) == (name if preferred else "")
