"""Modules of the libraries that are known at once and run only when something in them is first asked for.

The four libraries imported plainly cost 57 MiB and 0.3 s, most of it for what an agent never does (asyncio, typed models,
tracebacks in colour). Nothing of a library is replaced or changed here; only the moment is another, in the manner of
importlib.util.LazyLoader. That one cannot defer asyncio (a second `import` runs it), nor a package of which only submodules
are used. Whatever is asked for is there: a library that changes under us costs memory, never correctness, and
tests/unit/test_defer.py says which module ran.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

WHOLE = (
    "asyncio",  # structlog and pyroute2 import it: 8 MiB
    "grpc",  # etcd3's stubs import it: 8 MiB
    "inspect",  # dataclasses
    "structlog.stdlib",
    "structlog.threadlocal",
    "oauthlib",  # kubernetes.config.kube_config
    "oauthlib.oauth2",
    "requests_oauthlib",
    "tenacity",  # etcd3's client
    "google.protobuf.internal.python_message",  # protobuf's slow parser
)
"""Modules that run when an attribute is asked for."""
BY_SUBMODULES = (
    "etcd3",  # etcd3.etcdrpc
    "pyroute2",  # pyroute2.netlink.rtnl
    "kubernetes",  # kubernetes.client, kubernetes.config
    "kubernetes.client",  # configuration, rest: not its 700 models, nor pydantic (with them 20 MiB)
    "kubernetes.client.models",
    "kubernetes.config",  # incluster_config: not what kubeconfig files need (6 MiB), unless there is one
    "kubernetes.utils",  # what its client.rest uses
    "urllib3.http2",  # its probe: not importlib.metadata (2 MiB)
)
"""Packages of which only submodules are used: a submodule is imported without the package, which runs when anything else
is asked for."""
SOURCES = {("kubernetes.client", "Configuration"): "kubernetes.client.configuration"}
"""What kubernetes.config takes from a deferred package, and where that has it from."""
LATER = {
    ("kubernetes.client", "ApiClient"): "kubernetes.client.api_client",  # pydantic
    ("requests_oauthlib", "OAuth2Session"): "requests_oauthlib.oauth2_session",  # requests
}
"""As SOURCES, of what kubernetes.config.kube_config only ever calls, and only for OpenID Connect: fetched at the first call.
(Together 16 MiB.)"""
WITHOUT = ("rich", "better_exceptions")
"""What structlog takes when it finds it, to print tracebacks; the agent prints none. (It costs 4 MiB and 60 ms.)"""

_lock = threading.RLock()


class _Deferred(ModuleType):
    """A module that has not run. Lives in sys.modules like any other."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks of every module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        # One lock for all, since a module that runs may ask for another: two locks could be taken in either order.
        with _lock:
            own = self.__dict__
            if (home := SOURCES.get((self.__name__, name))) is not None:
                return getattr(importlib.import_module(home), name)
            if (home := LATER.get((self.__name__, name))) is not None:
                return _Later(home, name)
            if own["_overlay_by_submodules"] and (found := _submodule(self.__name__, name)) is not None:
                return found
            if type(self) is _Deferred and not own["_overlay_runs"]:
                own["_overlay_runs"] = True
                try:
                    own["_overlay_loader"].exec_module(self)
                finally:
                    own["_overlay_runs"] = False
                self.__class__ = ModuleType  # type: ignore[assignment]
        return object.__getattribute__(self, name)


class _Later:
    """A class of a library, fetched when it is first called."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module(self._module), self._name)(*arguments, **named)


class _Loader:
    """Makes the module, and does not run it."""

    def __init__(self, loader: Any, by_submodules: bool) -> None:
        self._loader, self._by_submodules = loader, by_submodules

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the real loader does."""
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Called by the import system when the module is to be run; it runs later."""
        spec = module.__spec__
        assert spec is not None
        module.__dict__.update(
            _overlay_loader=self._loader, _overlay_by_submodules=self._by_submodules, _overlay_runs=False
        )
        spec.loader = module.__loader__ = self._loader
        module.__class__ = _Deferred


class _Finder:
    """First in sys.meta_path."""

    def __init__(self, whole: Sequence[str], by_submodules: Sequence[str]) -> None:
        self._kinds = {**dict.fromkeys(whole, False), **dict.fromkeys(by_submodules, True)}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """The usual spec with our loader in it; None for modules that are not deferred."""
        if name not in self._kinds:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._kinds[name])  # type: ignore[assignment]
        return spec


def install() -> None:
    """Defer from now on. To be called before the libraries are imported, by a process that is an agent and nothing else."""
    sys.meta_path.insert(0, _Finder(WHOLE, BY_SUBMODULES))
    for name in WITHOUT:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # documented: such an import raises ImportError


def ran() -> list[str]:
    """The deferred modules that ran after all."""
    known = (*WHOLE, *BY_SUBMODULES)
    return [name for name in known if name in sys.modules and type(sys.modules[name]) is not _Deferred]


def _submodule(package: str, name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.{name}":
            raise
        return None
