"""A whole Kubernetes whose pods reach each other by the backends that need a module of the kernel (flannel's own end-to-end
list, connectivity_test.go): ipip, and the kernel's WireGuard. In a VM: `make kernel-cluster`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from overlay.lab.proof import Proof
from tests.cluster.backends import IPIP, VXLAN, WIREGUARD, change
from tests.support.clusters import two_nodes
from tests.support.wait import PATIENCE

pytestmark = pytest.mark.timeout(600 * PATIENCE)


@pytest.fixture(scope="module")
def proof() -> Iterator[Proof]:
    with two_nodes("k", patience=PATIENCE) as made:
        made.install()
        made.pods()
        yield made


@pytest.mark.parametrize("backend", [IPIP, WIREGUARD, VXLAN], ids=["ipip", "wireguard", "vxlan"])
def test_a_backend_of_the_kernel_connects_pods_of_a_whole_cluster(proof, backend):
    change(proof, backend)
