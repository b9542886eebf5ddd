"""Network namespaces of a test's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

from mvm.drivers import netns
from mvm.drivers.shell import LocalShell

_serial = count(1)


def unique_name() -> str:
    return f"mvm-test-{os.getpid()}-{next(_serial)}"


@contextmanager
def own_namespace() -> Iterator[str]:
    """The calling thread is in a new namespace until the end of the block."""
    shell, name = LocalShell(), unique_name()
    netns.create(shell, name)
    try:
        with netns.entered(netns.path_of(name)):
            yield name
    finally:
        netns.delete(shell, name)
