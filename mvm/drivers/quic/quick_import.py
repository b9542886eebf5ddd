"""Imports aioquic without the half of it that a client of ours never runs.

``aioquic.tls`` imports pyOpenSSL, service_identity and certifi for its own check of a server's certificate, which
`mvm.drivers.quic.tls` replaces. They are more than half of the time that the import takes, and a command line pays
it on every call. Here they are put off until somebody touches them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, TracebackType
from typing import Any

_HEAVY = ("OpenSSL", "certifi", "service_identity")


class _Deferred(ModuleType):
    """Stands for a module and becomes it when asked for anything."""

    def __getattr__(self, name: str) -> Any:
        _withdraw(self.__name__.partition(".")[0])
        return getattr(import_module(self.__name__), name)


class heavy_imports_deferred:  # noqa: N801 - reads as a with statement
    """Within it, the heavy modules that nobody has imported yet are deferred."""

    def __enter__(self) -> None:
        for name in _HEAVY:
            if name not in sys.modules:
                spec = find_spec(name)
                sys.modules[name] = stub = _Deferred(name)
                # What `from OpenSSL import crypto` asks a package for.
                stub.__path__ = list(spec.submodule_search_locations or ()) if spec else []
                stub.__dict__["crypto"] = _Deferred(f"{name}.crypto")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for name in _HEAVY:
            _withdraw(name)


def _withdraw(name: str) -> None:
    if isinstance(sys.modules.get(name), _Deferred):
        del sys.modules[name]
