# Everything starts from `make setup`, which installs what is missing (apt, PyPI) and makes .venv.
PY := .venv/bin/python
STAMP := .venv/.made-from

.PHONY: setup lab lab-down lint test lock image interop bench diagnosis diagnosis-mixed healthy page-test faults audit sbom cluster cluster-test netpol-e2e netpol-cyclonus netpol-conformance bundle reference newcomer kernels kernel-test kernel-cluster chart-test clean

setup: $(STAMP)

$(STAMP): .ci/setup .ci/requirements.txt pyproject.toml
	.ci/setup

lab: setup ## three nodes, six pods, the whole matrix; stays up
	.venv/bin/overlay lab up

lab-down: setup
	.venv/bin/overlay lab down

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache

test: setup
	.ci/kubernetes/build kube-apiserver
	.ci/promtool .venv/promtool
	$(PY) -m pytest tests -n 4 --dist worksteal --ignore=tests/interop --ignore=tests/cluster --ignore=tests/faults \
		--ignore=tests/kernels --ignore=tests/chart --ignore=tests/page --ignore=tests/healthy

cluster: setup ## a real two-node Kubernetes, our image and manifest on it, and what operators do to it (first time: 10 minutes); IP_FAMILY=dual
	.ci/cluster-setup
	.venv/bin/overlay cluster prove --family $(or $(IP_FAMILY),ipv4)

cluster-test: setup ## the same as tests, in both families; the move from the real flannel and back; flannel's end-to-end list with CoreDNS (Go)
	.ci/cluster-setup
	.ci/flannel-image
	.ci/coredns-image
	$(PY) -m pytest tests/cluster

netpol-e2e: setup ## Kubernetes' own NetworkPolicy tests (its e2e.test) against our agent on a real cluster (Go; half an hour); FOCUS=regex
	.ci/cluster-setup
	.ci/netpol/build e2e
	.ci/netpol/run --judge e2e $(if $(FOCUS),--focus "$(FOCUS)") --family $(or $(IP_FAMILY),ipv4)

netpol-cyclonus: setup ## the same by cyclonus' cases, asking pods by their addresses (more than an hour); INCLUDE=tags
	.ci/cluster-setup
	.ci/netpol/build cyclonus
	.ci/netpol/run --judge cyclonus $(if $(INCLUDE),--include "$(INCLUDE)") --family $(or $(IP_FAMILY),ipv4)

netpol-conformance: setup ## ClusterNetworkPolicy by the conformance tests of network-policy-api (Go; 20 minutes); FOCUS=regex, FEATURES=names
	.ci/cluster-setup
	.ci/netpol/build conformance
	.ci/netpol/run --judge conformance $(if $(FOCUS),--focus "$(FOCUS)") $(if $(FEATURES),--features "$(FEATURES)") \
		--family $(or $(IP_FAMILY),ipv4)

bundle: setup ## image and manifests in one archive, for machines that reach no registry
	.ci/cluster-setup
	.ci/bundle

interop: setup ## the real flanneld beside ours and swapped under live traffic (builds it: Go, some minutes)
	bench/flanneld/build
	.ci/kubernetes/build kube-apiserver
	FLANNELD=$(CURDIR)/.venv/flanneld $(PY) -m pytest tests/interop -n 2

audit: setup ## known faults of the pinned packages, asked of PyPI; says so where it cannot be asked
	.ci/audit

sbom: setup ## all that is in the image, as CycloneDX
	.ci/cluster-setup
	.ci/sbom

diagnosis: setup ## faults planted in a lab of three nodes, and what status and check say of each: writes docs/diagnosis.md (6 minutes)
	OVERLAY_DIAGNOSIS_TABLE=1 $(PY) -m pytest tests/diagnosis -n 2

diagnosis-mixed: setup ## the same with the real flanneld as one of the nodes (builds it: Go, some minutes)
	bench/flanneld/build
	FLANNELD=$(CURDIR)/.venv/flanneld $(PY) -m pytest tests/interop/test_diagnosis.py -n 2

healthy: setup ## a lab that nobody harms: nothing is said of it for ten minutes
	$(PY) -m pytest tests/healthy

page-test: setup ## the page in a real headless browser, at three sizes, judged by axe (installs Chromium); screenshots in build/page
	.ci/page-setup
	$(PY) -m pytest tests/page

faults: setup ## what is done to an agent, what it costs and how long it lasts: writes the table of docs/reliability.md (13 minutes)
	.ci/kubernetes/build kube-apiserver
	OVERLAY_FAULT_TABLE=1 $(PY) -m pytest tests/faults -n 2

bench: setup ## every figure of docs/performance.md, beside the real flanneld and kube-network-policies (builds them: Go, some minutes; then an hour)
	command -v iperf3 >/dev/null && command -v ethtool >/dev/null || apt-get install -y iperf3 ethtool
	bench/flanneld/build
	bench/kube_network_policies/build
	.ci/kubernetes/build kube-apiserver
	for it in cold warm nodes storm datapath watchers repair policy policy_packets policy_beside; do echo "== bench.$$it"; $(PY) -m bench.$$it || exit 1; done
	$(PY) -m bench.cold --peers 100000 --rounds 1 --kinds ours,floor

lock: setup ## take newer versions of what pyproject.toml asks for
	$(PY) -m pip install --quiet uv
	printf 'pip-audit\ncyclonedx-bom\n' | .venv/bin/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 \
		--upgrade --no-annotate --custom-compile-command "make lock" -o .ci/audit.txt -
	printf 'selenium\n' | .venv/bin/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --upgrade \
		--no-annotate --custom-compile-command "make lock" -c .ci/requirements.txt -o .ci/page.txt -
	printf 'axe-playwright-python\n' | .venv/bin/uv pip compile --quiet --no-deps --universal --generate-hashes --upgrade \
		--python-version 3.11 --no-annotate --no-header - >>.ci/page.txt
	.venv/bin/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --upgrade \
		--extra cli --extra lab --extra dev --custom-compile-command "make lock" -o .ci/requirements.txt pyproject.toml
	.venv/bin/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --upgrade --no-annotate \
		--extra cli --extra build -c .ci/requirements.txt --custom-compile-command "make lock" -o .ci/runtime.txt pyproject.toml

newcomer: ## make lab and make test in a bare debootstrapped Debian (RELEASE=trixie for another): what .ci/setup forgets shows
	.ci/newcomer $(RELEASE)

chart-test: setup ## the Helm chart rendered by the real helm and compared with the manifest (builds helm: Go, five minutes)
	.ci/helm/build
	$(PY) -m pytest tests/chart

KERNEL_TESTS := tests/kernel tests/kernels tests/backends tests/agent/test_repair.py tests/agent/test_network.py tests/agent/test_guard.py \
	tests/agent/test_antispoof.py tests/agent/test_other_doors.py tests/agent/test_reach.py \
	tests/policy/test_enforcing.py tests/policy/test_attackers.py tests/policy/test_cluster_wide.py --ignore=tests/kernels/test_cluster.py
NEEDS_QEMU := qemu-system-x86 busybox-static kmod cpio xz-utils wireguard-tools

kernels: setup ## what an agent does to the kernel, on Debian's 5.10, 6.1 and 6.12 under QEMU: table of docs/reliability.md (hours)
	command -v qemu-system-x86_64 busybox wg >/dev/null || apt-get install -y --no-install-recommends $(NEEDS_QEMU)
	bench/flanneld/build
	for it in 5.10 6.1 6.12; do .ci/kernel-run $$it build/kernels/$$it $(KERNEL_TESTS) -n 2; done; \
	$(PY) -m tests.support.kernels docs/reliability.md build/kernels/*

kernel-test: setup ## one of them: make kernel-test KERNEL=6.1 TESTS=tests/kernel
	command -v qemu-system-x86_64 busybox wg >/dev/null || apt-get install -y --no-install-recommends $(NEEDS_QEMU)
	bench/flanneld/build
	.ci/kernel-run $(or $(KERNEL),6.1) build/kernels/$(or $(KERNEL),6.1) $(or $(TESTS),tests/kernel) -n 2

kernel-cluster: setup ## a whole Kubernetes by ipip and the kernel's WireGuard, in a VM: make kernel-cluster KERNEL=6.1 (an hour)
	command -v qemu-system-x86_64 busybox wg >/dev/null || apt-get install -y --no-install-recommends $(NEEDS_QEMU)
	.ci/cluster-setup
	OVL_KERNEL_MEMORY=8G OVL_KERNEL_SECONDS=7200 .ci/kernel-run $(or $(KERNEL),6.1) build/kernels/cluster-$(or $(KERNEL),6.1) \
		tests/kernels/test_cluster.py

reference: setup ## docs/reference.md's table of flags, from the flags themselves
	$(PY) -m overlay.cli.reference docs/reference.md

image: ## BASE=... for another Debian base
	docker build $(if $(BASE),--build-arg BASE=$(BASE)) -t overlayd .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache
