"""A Feed followed as the agent follows it, and records for it."""

from lease.model import Endpoint, Lease, prefix
from lease.records.codec import encode_value
from lease.store import Changes, ConfigText, Feed, Gone, Snapshot
from tests.support.etcd import Etcd
from tests.support.wait import until

ROOT = "/coreos.com/network"


def value(n: int, ip: int = 0) -> tuple[str, bytes]:
    subnet = prefix(f"10.244.{n}.0/24")
    key = f"10.244.{n}.0-24"
    return key, encode_value(
        Lease(key, "vxlan", Endpoint(subnet, ip or 0xC0A80100 + n, 1, 0x0A0000000000 + n), None, "", 0, 0, 0)
    )


class Follower:
    """Applies what a Feed posts, as the agent does; its view is compared with the store."""

    def __init__(self, store) -> None:
        self.store = store
        self.view: dict[str, bytes] = {}
        self.config: bytes | None = None
        self.events: list[object] = []
        self.feed = Feed(store, self.take)
        self.feed.start()

    def take(self, event) -> None:
        self.events.append(event)
        if isinstance(event, Snapshot):
            self.config = event.config
            self.view = {key: encode_value(lease) for key, lease in event.leases.items()}
        elif isinstance(event, Changes):
            for change in event.changes:
                if isinstance(change, Lease):
                    self.view[change.key] = encode_value(change)
                elif isinstance(change, Gone):
                    self.view.pop(change.key, None)
                elif isinstance(change, ConfigText):
                    self.config = change.text

    def count(self, kind) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    def stop(self) -> None:
        self.feed.stop()
        self.store.close()
        self.feed.join(10)
        assert not self.feed.is_alive()


def put(etcd: Etcd, n: int, ip: int = 0) -> None:
    key, data = value(n, ip)
    etcd.put(f"{ROOT}/subnets/{key}", data)


def agrees(follower: Follower, etcd: Etcd) -> bool:
    there = {key.rpartition("/")[2]: kv["value"] for key, kv in etcd.get(f"{ROOT}/subnets/").items()}
    return follower.view == there


def follows(follower: Follower, etcd: Etcd, seconds: float = 25.0) -> None:
    until("the follower has what etcd has", lambda: agrees(follower, etcd), seconds)


def decoded(n: int) -> Lease:
    from lease.records.codec import decode_lease

    return decode_lease(*value(n))


def b64(data) -> str:
    import base64

    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()
