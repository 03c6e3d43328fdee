"""overlayd, the process: arguments, threads, signals, exit codes.

Exit codes: 0 stopped by a signal, 1 cannot go on (another node has our address, a bug), 2 the command line is wrong.
systemd's Restart=on-failure restarts on 1 and 2.
"""

from __future__ import annotations

import gc
import os
import queue
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from lease.endpoint import endpoint_parts
from lease.families import FAMILIES
from lease.model import ip_number
from overlay import __version__
from overlay.api import serve
from overlay.policy import outside as policy
from overlay.process.log import log
from overlay.process.memory import give_back
from overlay.process.rundir import LOCK_NAME, RunDir, RunDirError
from overlay.process.sha256 import sha256
from overlay.settings.files import check_files
from overlay.settings.settings import Settings, SettingsError, read_settings, unknown_variables
from overlay.settings.stores import etcd_store, node_store

if TYPE_CHECKING:
    from lease.store import Feed, LeaseSource
    from lease.tenure.keeper import Holder, TenureThread
    from overlay.agent.loop import Loop
    from overlay.control.health import Health
    from overlay.notices.controller import Teller
    from overlay.process.watched import FileThread

EXIT_STOPPED, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
KEPT_EVERY_S, KEPT_AGAIN_S = 1.0, 60.0
MACHINE_ID = "/etc/machine-id"


def main() -> None:
    """The command `overlayd`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run an agent until a signal; the exit code."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to read again
    try:
        settings, version_only = read_settings(arguments, os.environ)
        if not version_only:
            check_files(settings)
    except SettingsError as error:
        print(f"overlayd: {error}", file=sys.stderr)
        return EXIT_USAGE
    if version_only:
        print(__version__, file=sys.stderr)  # where flanneld prints it
        return EXIT_STOPPED
    log.hold(settings.log_level, settings.log_format)
    for name in unknown_variables(os.environ):
        log.warning("environment", variable=name, effect="unknown variable, ignored")
    try:
        return _run_locked(settings)
    finally:
        log.release()


def _run_locked(settings: Settings) -> int:
    """With the run directory held."""
    try:
        held = RunDir(settings.run_dir)
        code = _run(settings, held)
    except SettingsError as error:
        _refuse(error)
        return EXIT_USAGE
    except (_CannotStart, RunDirError) as error:
        _refuse(error)
        return EXIT_FAILED
    except Exception as error:  # a bug: say where, leave the datapath, let the supervisor start us again
        log.error("crashed", error=repr(error), where=traceback.format_exc().strip().replace("\n", " | "))
        return EXIT_FAILED
    held.close()
    return code


def _refuse(error: Exception) -> None:
    log.release()  # what led there stands before it
    print(f"overlayd: {error}", file=sys.stderr)


class _CannotStart(Exception):
    """One line for the operator."""


SWITCH_S = 0.001
"""A thread that has an event waits so long at most for one that computes (of CPython's 5 ms some three add up)."""


def _run(settings: Settings, held: RunDir) -> int:
    from lease.store import Feed

    sys.setswitchinterval(SWITCH_S)
    rng = random.Random()  # noqa: S311 (draws a subnet, spreads load)
    side = _on_nodes(settings, rng) if settings.kube else _on_etcd(settings, rng)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.excepthook = lambda args: inbox.put(_died(args.thread, args.exc_value))
    # The list is on its way while the other half of the agent is being imported.
    feed = Feed(side.store, inbox.put)
    feed.start()
    return _agent(settings, held, side, feed, inbox)


def _agent(settings: Settings, held: RunDir, side: _StoreSide, feed: Feed, inbox: queue.SimpleQueue[Any]) -> int:
    from lease.tenure.keeper import TenureThread, boottime
    from overlay.agent.loop import Loop, Stop
    from overlay.answers import Answers
    from overlay.compose import Outside, compose
    from overlay.firewall.forward import SHARED_TABLE
    from overlay.firewall.nat import TABLE_PREFIX
    from overlay.kernel.monitor import Monitor, NftMonitor
    from overlay.kernel.route.links import sysctls_at

    store = side.store
    sysctls_at(settings.proc_sys_net)
    hosts = StoreHosts(side.hosts)
    answers = Answers(lambda: loop.ask_status())  # noqa: PLW0108 (it is made below)
    outside = Outside(
        clock=boottime,
        post=inbox.put,
        stop=lambda reason: inbox.put(Stop(reason, 1)),
        store_place=lambda: store.place,
        config_place=store.config_place,
        store_hosts=hosts.of,
        reconnect=store.reconnect,
        identity_of=identity(settings.node_name),
        who_answers=_who_answers,
        ask_routes=answers.routes(),
        teller=side.teller,
        page_handler=answers.page_handler,
        policy_feeds=(policies := policy.feeds(settings, inbox.put)),
        set_log_level=log.set_level,
    )
    try:
        made = compose(settings, outside)
    except OSError as error:
        raise _CannotStart(
            f"cannot talk to the kernel: {error}; overlayd needs CAP_NET_ADMIN and CAP_NET_RAW"
        ) from error
    loop = Loop(made.controllers, made.current, made.health, inbox, boottime)
    made.ownership.claimer = claimer = TenureThread(side.tenure, inbox.put, side.renew_within_s)
    loop.each_pass = made.ownership.judge_renewal

    def started() -> None:
        notify("READY=1")
        side.network_up(claimer)
        garbage_as_usual()

    loop.started = started
    files = _watched_files(settings, inbox)
    threads: list[threading.Thread] = [
        Monitor(inbox.put, made.ports[0], FAMILIES.values()),
        NftMonitor(TABLE_PREFIX, (SHARED_TABLE,), inbox.put, made.ports[1]),
        claimer,
        *files,
        *policy.attachments(settings, inbox.put),
    ]
    _post_signals(inbox)
    loop.reload = lambda: _reload(files, claimer, policies, loop.ever_started)
    server, door = _serve(settings, loop)
    tell_systemd, keep = watchdog(boottime), keeping(held, server, boottime)

    def alive() -> None:
        tell_systemd()
        if keep():
            with suppress(OSError):  # what is wrong is a problem already
                _open(door, settings, loop.health)

    loop.alive = alive
    for thread in threads:
        thread.start()
    try:
        return loop.run()
    finally:
        answers.close()
        policies.close()
        feed.stop()
        claimer.stop()
        store.close()


def _post_signals(inbox: queue.SimpleQueue[Any]) -> None:
    """Signals are events like others: the loop ends, or reads files again."""
    from overlay.agent.loop import Reload, Stop

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _frame: inbox.put(Stop(signal.Signals(got).name)))
    signal.signal(signal.SIGHUP, lambda _got, _frame: inbox.put(Reload()))


def _reload(files: list[FileThread], claimer: TenureThread, policies: Any, started: bool) -> None:
    """SIGHUP. started: before that systemd waits for the start, and is told of nothing else."""
    if started:
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    log.info("reload", files=", ".join(file for each in files for file in each.paths()) or "none are named")
    for each in files:
        each.read_now()
    policies.read_now()
    claimer.recheck()
    if started:
        notify("READY=1")


def _watched_files(settings: Settings, inbox: queue.SimpleQueue[Any]) -> list[FileThread]:
    """The thread that reads the files an operator may change, where there are any; each was read once."""
    from overlay.process.watched import FileThread

    paths = {
        "net-conf": settings.net_config_path if settings.kube else "",
        "cni-conf": settings.cni_conf_template,
        "live-settings": settings.live_settings,
    }
    files = FileThread({what: path for what, path in paths.items() if path}, inbox.put)
    files.read_all()
    return [files] if files.any() else []


def _died(thread: threading.Thread | None, error: BaseException | None) -> Any:
    from overlay.agent.loop import Died

    return Died(thread.name if thread else "?", error or RuntimeError("unknown"))


def garbage_as_usual() -> None:
    """The collector is off while we start (overlay/__main__.py): what exists then stays, and need never be collected."""
    gc.collect()
    gc.freeze()
    gc.enable()
    give_back()


def _who_answers(address: int) -> Any:
    from overlay.node.prober import who_answers  # with all that it needs of the kernel, when it is asked

    return who_answers(address)


class _StoreSide(NamedTuple):
    """What one kind of store brings along."""

    store: LeaseSource
    tenure: Holder
    renew_within_s: float
    hosts: tuple[str, ...]
    """Whose route says which interface carries the tunnel; none: the default route's, as flannel does."""
    network_up: Callable[[TenureThread], None]
    """Called when the datapath is in place."""
    teller: Teller | None = None
    """Who tells users what is wrong, where the store has a place for it."""


def _on_etcd(settings: Settings, rng: random.Random) -> _StoreSide:
    from lease.tenure.etcd import Tenure

    store = etcd_store(settings)
    log.info("start", version=__version__, etcd=",".join(settings.etcd_endpoints), prefix=settings.etcd_prefix)
    tenure = Tenure(store, _who_answers, settings.lease_ttl_s, rng)
    return _StoreSide(store, tenure, settings.renew_within_s, settings.etcd_endpoints, lambda _claimer: None)


def _on_nodes(settings: Settings, rng: random.Random) -> _StoreSide:
    from lease.tenure.kubernetes import CHECK_S, NodeTenure

    store, names = node_store(settings)
    log.info("start", version=__version__, store=store.place, node=settings.node_name, config=settings.net_config_path)
    tenure = NodeTenure(store, names, settings.node_name, settings.set_condition, rng)

    def network_up(claimer: TenureThread) -> None:
        tenure.network_up = True  # and our Node is to say so
        claimer.recheck()

    return _StoreSide(store, tenure, CHECK_S, (), network_up, store)


def _serve(settings: Settings, loop: Loop) -> tuple[serve.UnixServer, serve.TcpDoor | None]:
    def healthz() -> serve.Answer:
        return serve.text(200, "overlayd is running") if loop.health.healthy() else serve.text(503, "the loop is stuck")

    def readyz() -> serve.Answer:
        ready, why = loop.health.readiness()
        return serve.text(200, "overlayd is ready") if ready else serve.text(503, f"not ready: {why}")

    def status() -> serve.Answer:
        found = loop.ask_status()
        return serve.text(503, "the loop is stuck") if found is None else serve.as_json(200, found.json())

    def metrics() -> serve.Answer:
        from overlay.agent.loop import PASS_BOUNDS_S
        from overlay.api import process
        from overlay.api.family import SECOND
        from overlay.api.metrics import CONTENT_TYPE, Outside, Passes, exposition
        from overlay.cni.lists import NETWORK_NAME

        found = loop.ask_status()
        if found is None:
            return serve.text(503, "the loop is stuck")
        devices = [(found.sections.get(f"device{end}") or {}).get("name", "") for end in ("", SECOND)]
        traffic = [each for name in devices if name and (each := process.traffic(name)) is not None]
        used = process.used_addresses(settings.cni_data_dir, NETWORK_NAME) if settings.cni_conf_dir else None
        outside = Outside(process.process(), Passes(*loop.passes(), PASS_BOUNDS_S), traffic, used)
        return 200, CONTENT_TYPE, exposition(found, outside)

    routes: serve.Routes = {"/healthz": healthz, "/readyz": readyz, "/metrics": metrics}
    roots = {**routes, "/status": status, "/policy": lambda: policy.answer(settings, loop.post)}
    try:
        server = serve.serve_unix(f"{settings.run_dir}/{serve.SOCKET_NAME}", roots)
    except OSError as error:
        where = f"{settings.run_dir}/{serve.SOCKET_NAME}"
        raise _CannotStart(f"--run-dir: {where}: {error.strerror or error}") from error
    if not settings.healthz_port:
        return server, None
    often = {**routes, "/metrics": serve.same_for_a_moment(metrics)}  # anybody may ask there
    door = serve.TcpDoor(settings.healthz_ip, settings.healthz_port, serve.by_path(often), "health")
    try:
        _open(door, settings, loop.health)
    except OSError as error:
        where = f"{settings.healthz_ip}:{settings.healthz_port}"
        raise _CannotStart(f"--healthz-ip, --healthz-port: cannot listen on {where}: {error.strerror}") from error
    return server, door


def _open(door: serve.TcpDoor | None, settings: Settings, health: Health) -> None:
    """Serve /healthz where that is wanted, and nobody has its port. Raises OSError."""
    if door is None:
        return
    port = settings.healthz_port
    taken = (
        f"--healthz-port: another process has port {port} (ss -ltnp sport = {port} names it); tried again each second"
    )
    health.report("healthz", "" if door.open() else taken, harmless=True)


def keeping(held: RunDir, server: serve.UnixServer, clock: Callable[[], float]) -> Callable[[], bool]:
    """What puts the files of the run directory back that a living agent holds open, where somebody removed them: called at
    each turn, it looks once a second; whether it did."""
    due = [clock()]

    def keep() -> bool:
        if (now := clock()) < due[0]:
            return False
        due[0] = now + KEPT_EVERY_S
        try:
            again = [name for name, of in ((LOCK_NAME, held), (serve.SOCKET_NAME, server)) if of.keep()]
        except (OSError, RunDirError) as error:  # a full disk, or another agent that was faster
            due[0] = now + KEPT_AGAIN_S
            log.warning("file.lost", path=held.path, error=str(error), effect="`overlay` does not reach this agent")
            return True
        for name in again:
            log.warning("file.mended", path=f"{held.path}/{name}", effect="somebody removed or replaced it")
        return True

    return keep


def notify(state: str) -> None:
    """Tell systemd, where it started us with Type=notify (sd_notify(3)); flanneld says READY=1 at the same moment."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect(f"\0{path[1:]}" if path.startswith("@") else path)
            connection.send(state.encode())
    except OSError as error:
        log.warning("notify", socket=path, error=str(error), effect="systemd does not learn that we are ready")


def watchdog(clock: Callable[[], float]) -> Callable[[], None]:
    """What tells systemd that the loop turns, at each turn that is due: twice in WATCHDOG_USEC (sd_watchdog_enabled(3))."""
    try:
        interval_s = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    except ValueError:
        interval_s = 0.0
    meant = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    due = [clock()]

    def tell() -> None:
        if (now := clock()) >= due[0]:
            due[0] = now + interval_s
            notify("WATCHDOG=1")

    return tell if interval_s > 0 and meant else lambda: None


def identity(node_name: str) -> Callable[[str], Any]:
    """The identity of this node, given the MAC of its underlay interface. The machine-id itself is confidential
    (man 5 machine-id): a hash of it, keyed by our purpose, is written."""
    from lease.tenure.claim import Identity

    try:
        with open(MACHINE_ID, encoding="ascii") as file:
            machine = file.read().strip()
    except (OSError, ValueError):
        machine = ""
    usable = len(machine) == 32 and machine != "0" * 32
    hashed = sha256(f"overlayd {machine}".encode())[:16] if usable else ""
    return lambda link: Identity(hashed, node_name, link)


class StoreHosts:
    """The store's addresses of a family by the name they were given under, None for one that does not resolve (yet).

    A resolver may take half a minute to say no, so names are resolved in a thread, and the loop asks what is known.
    """

    RETRY_S = 2.0

    def __init__(self, endpoints: tuple[str, ...]) -> None:
        self._known: dict[str, dict[int, int] | None] = {}
        names = []
        for endpoint in endpoints:
            host = (endpoint_parts(endpoint) or ("", "", 0))[1]
            family = 6 if ":" in host else 4
            try:
                self._known[host] = {family: ip_number(host, family)}
            except ValueError:
                self._known[host] = None
                names.append(host)
        if names:
            threading.Thread(target=self._resolve, args=(names,), name="resolver", daemon=True).start()

    def of(self, family: int) -> dict[str, int | None]:
        """Those of a family."""
        known = self._known.items()
        return {
            host: None if there is None else there[family] for host, there in known if there is None or family in there
        }

    def _resolve(self, names: list[str]) -> None:
        while names:
            for host in list(names):
                try:
                    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
                except (OSError, UnicodeError):
                    continue
                by_af = {int(af): str(where[0]) for af, _, _, _, where in reversed(found)}
                families = {number: by_af[family.af] for number, family in FAMILIES.items() if family.af in by_af}
                addresses = {family: ip_number(text, family) for family, text in families.items() if "%" not in text}
                self._known = {**self._known, host: addresses}
                names.remove(host)
            if names:
                time.sleep(self.RETRY_S)


if __name__ == "__main__":
    main()
