"""Whose a network namespace is, as the namespace itself says.

Tables, bridges and TAPs have fixed names, so one namespace is one state directory's. The claim is the alias of its
loopback interface: every namespace has one, it ends with the namespace, no copied directory brings it along, and
whoever flushes rules or removes interfaces leaves it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mvm.domain.addressing import tap_uid
from mvm.domain.identity import Claim
from mvm.drivers import netns
from mvm.drivers.shell import LocalShell

_CALLERS = Path("/proc/thread-self/ns/net")


def holder(namespace: str | None) -> Claim | None:
    """Who has claimed `namespace` (None: the caller's own), which is there; None when nobody has."""
    [loopback] = _links(namespace, "lo")
    return Claim.parse(str(loopback.get("ifalias", "")))


def take(namespace: str | None, claim: Claim) -> None:
    """`namespace` is claimed. Raises `NotAllowed` (``stack.netns_claimed``) when it is another's."""
    with _turn(namespace):
        if there := holder(namespace):
            there.check(claim, namespace)
        _say(namespace, claim.text)


def release(namespace: str | None, mark: str) -> None:
    """Whoever has this mark claims `namespace` no more; what others claim stays theirs."""
    if namespace is not None and not netns.exists(namespace):
        return
    with _turn(namespace):
        there = holder(namespace)
        if there and there.mark == mark:
            _say(namespace, "")


def held_taps(namespace: str | None) -> Sequence[str]:
    """Guests' TAPs in `namespace` that a process has open, by the carrier that they have meanwhile."""
    links = _links(namespace)
    held = [str(link["ifname"]) for link in links if "LOWER_UP" in link.get("flags", ())]
    return [name for name in held if tap_uid(name) is not None]


@contextmanager
def _turn(namespace: str | None) -> Iterator[None]:
    """Nobody else claims or releases it meanwhile, by whichever name they know it."""
    fd = os.open(netns.path_of(namespace) if namespace else _CALLERS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _say(namespace: str | None, text: str) -> None:
    _inside(namespace).run(["ip", "link", "set", "dev", "lo", "alias", text])


def _links(namespace: str | None, *which: str) -> list[dict[str, Any]]:
    text = _inside(namespace).run(["ip", "-j", "link", "show", *which]).stdout
    return [link for link in json.loads(text or "[]") if link]


def _inside(namespace: str | None) -> LocalShell:
    return LocalShell(netns.path_of(namespace) if namespace else None)
