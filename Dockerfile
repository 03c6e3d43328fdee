# overlayd on a small Debian: docker build --build-arg BASE=debian:trixie-slim .
# BASE may be any image of Debian 12 or later.
ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 python3-venv ca-certificates \
    containernetworking-plugins
WORKDIR /src
# Versions and hashes of .ci/runtime.txt; compiled, since a container starts anew each time (4.5 MiB and 300 ms less).
COPY .ci/runtime.txt ./
RUN python3 -m venv /opt/overlay \
 && /opt/overlay/bin/pip install -q --no-cache-dir --require-hashes -r runtime.txt
COPY pyproject.toml README.md ./
COPY lease lease
COPY overlay overlay
RUN /opt/overlay/bin/pip install -q --no-cache-dir --no-deps --no-build-isolation . \
 && /opt/overlay/bin/pip uninstall -q -y setuptools pip \
 && /opt/overlay/bin/python -m compileall -q /opt/overlay/lib

FROM ${BASE}
# nftables for masquerade and forwarding; iptables for nodes whose FORWARD chain still is the old one (iptables-legacy);
# iproute2 so that an engineer at 3 a.m. finds `ip` and `bridge` beside us.
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 nftables iptables iproute2 ca-certificates \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/overlay /opt/overlay
# For hosts that have none: `overlay install-cni` (docs/kubernetes.md).
COPY --from=build /usr/lib/cni/bridge /usr/lib/cni/host-local /usr/lib/cni/portmap /usr/lib/cni/loopback /usr/lib/cni/
ENV PATH=/opt/overlay/bin:$PATH
ENTRYPOINT ["overlayd"]
