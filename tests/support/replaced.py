"""A guest whose tenant has put a program of its own in the place of everything that serves the host there."""

from __future__ import annotations

from base64 import b64encode

_LIAR = """#!/bin/sh
for found in /sys/class/virtio-ports/*; do
    [ "$(cat "$found/name")" = "$1" ] && exec <>"/dev/${found##*/}" >&0
done
%s
"""
_SWAP = """#!/bin/sh
chmod +x /run/liar
mount -o bind /run/liar /usr/lib/mvm/agent
kill -9 $(grep -lE '^/usr/lib/mvm/(agent|runner|moment|sh)' /proc/[0-9]*/cmdline | cut -d/ -f3)
"""


def agent_replaced_by(how: str) -> str:
    """A command, for a shell in the guest: soon after, each of the host's ports belongs to the shell command `how`.

    Nobody hears the command's own end: a port is opened by one process at a time, so who serves it has to go first.
    """
    files = {"liar": _LIAR % how, "swap": _SWAP}
    written = [f"echo {b64encode(text.encode()).decode()} | base64 -d >/run/{name}" for name, text in files.items()]
    return "; ".join([*written, "setsid sh /run/swap </dev/null >/dev/null 2>&1 &"])
