"""etcd3 0.12 beside today's protobuf. Call `load()` before anything of etcd3 is used.

etcd3's generated `*_pb2.py` are older than protobuf 3.21 accepts ("Descriptors cannot be created directly"). Their
content is still right: each carries its file descriptor in serialized form. We take that literal out of each file
(without running it), add it to a descriptor pool of our own, let protobuf make the message classes, and put modules
holding these under the names that etcd3 imports. Nothing of the library is changed, and the fast parser is used.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

_FILES = ("kv", "auth", "rpc")
"""In the order of their imports."""
_BEFORE, _BEHIND = "serialized_pb=_b('", "')"


def load() -> None:
    """Make `etcd3.etcdrpc` importable; a second call costs nothing.

    Raises:
        ImportError: etcd3 is missing, or is not laid out as in 0.12: says what was expected.
    """
    if f"etcd3.etcdrpc.{_FILES[-1]}_pb2" in sys.modules:
        return
    # grpc's fork handlers serve forks without exec, which we never do; its own log lines would break ours.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from google.protobuf.descriptor_pool import DescriptorPool
    from google.protobuf.message_factory import GetMessageClass

    spec = importlib.util.find_spec("etcd3")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the package etcd3 is not installed; run `make setup`")
    folder = f"{spec.submodule_search_locations[0]}/etcdrpc"
    pool = DescriptorPool()
    modules = {}
    for name in _FILES:
        path = f"{folder}/{name}_pb2.py"
        try:
            with open(path, encoding="utf-8") as file:
                literal = _literal(file.read())
        except OSError:
            literal = ""
        if not literal:
            raise ImportError(f"{path} carries no serialized descriptor; lease/etcd/protobuf.py knows etcd3 0.12 only")
        descriptor = pool.AddSerializedFile(_bytes(literal))
        module = ModuleType(f"etcd3.etcdrpc.{name}_pb2")
        for message, its_descriptor in descriptor.message_types_by_name.items():
            setattr(module, message, GetMessageClass(its_descriptor))
        modules[module.__name__] = module
    sys.modules.update(modules)


def _literal(source: str) -> str:
    """The content of the string literal that holds the descriptor, "" where there is none. (A regular expression that knows
    of escapes takes 3 ms for it.)"""
    _, found, rest = source.partition(_BEFORE)
    end = rest.find(_BEHIND)
    while end > 0 and (end - len(rest[:end].rstrip("\\"))) % 2:  # an escaped quote
        end = rest.find(_BEHIND, end + 1)
    return rest[: max(0, end)] if found else ""


def _bytes(literal: str) -> bytes:
    """A Python string literal's content, one byte for each character (the module ast, for this alone, costs 1 MiB)."""
    return literal.encode("latin1").decode("unicode_escape").encode("latin1")
