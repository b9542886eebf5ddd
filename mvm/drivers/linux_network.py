"""Bridges and TAPs, in the network namespace of the calling thread."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mvm.domain.addressing import METADATA, TenantNetwork, bridge_mac, tap_uid
from mvm.drivers.interfaces import Interfaces
from mvm.drivers.tap import create as create_tap
from mvm.errors import Failed, NotAllowed
from mvm.ports.network import BridgeState
from mvm.ports.shell import Shell

_CONF = Path("/proc/sys/net/ipv4/conf")
_OWN_ADDRESSES = "1"  # else a bridge answers ARP for every other tenant's gateway, too
_TRIES = 4
_BRIDGE_PORTS = 1023  # the kernel numbers them in 10 bits, and 0 is none
_GATEWAY_OFFSET = 1

Links = Mapping[str, Mapping[str, Any]]


class LinuxNetwork:
    """ports/network.py. Programs cost milliseconds each, so what is usual is asked of the kernel without one.

    When that fails (something is missing, or there already), ``ip`` looks at what is there, and makes only the
    difference; other workers may change it meanwhile, so that is tried a few times.
    """

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._interfaces = Interfaces()

    def ensure_bridge(self, network: TenantNetwork) -> None:
        """See ports/network.py."""
        self._ensure(network)

    def ensure_tap(self, network: TenantNetwork, offset: int) -> None:
        """See ports/network.py. A TAP that cannot become a port is removed again."""
        tap = network.tap(offset)
        try:
            self._ensure(network, offset)
        except Failed:
            if self.taps().get(tap, network.bridge) is None:
                self.remove_taps(frozenset({tap}))
            raise

    def _ensure(self, network: TenantNetwork, offset: int | None = None) -> None:
        tap = None if offset is None else network.tap(offset)
        create = [] if offset is None else _tap_made(network, offset)
        attach = [] if offset is None else _tap_up(network, offset)

        def missing(links: Links) -> list[str]:
            bridge_there, tap_there = network.bridge in links, tap in links
            _must_be(_is_bridge, network.bridge, links)
            if tap is not None:
                _must_be(_is_tap, tap, links)
            bridge = [] if bridge_there else [f"link add {network.bridge} type bridge"]
            return [*bridge, *_bridge_up(network), *([] if tap_there else create), *attach]

        try:
            self._usual(network, offset)
        except OSError:
            self._apply(missing)
        with suppress(FileNotFoundError):  # removed meanwhile
            (_CONF / network.bridge / "arp_ignore").write_text(_OWN_ADDRESSES)

    def _usual(self, network: TenantNetwork, offset: int | None) -> None:
        """As the commands say; it fails before it touches what is not ours."""
        bridge = network.bridge
        self._interfaces.bridge_up(bridge, network.mac(_GATEWAY_OFFSET))
        self._interfaces.give(bridge, network.gateway, network.subnet.prefixlen)
        self._interfaces.give(bridge, METADATA, METADATA.max_prefixlen)
        if offset is not None:
            create_tap(network.tap(offset), network.uid(offset))
            self._interfaces.port_up(network.tap(offset), bridge)
            self._interfaces.settle(bridge, network.ip(offset), network.mac(offset))

    def remove_bridges(self, names: frozenset[str]) -> None:
        """See ports/network.py."""
        self._remove(_is_bridge, names)

    def remove_taps(self, names: frozenset[str]) -> None:
        """See ports/network.py."""
        self._remove(_is_tap, names)

    def _remove(self, kind: Callable[[Mapping[str, Any]], bool], names: frozenset[str]) -> None:
        def left(links: Links) -> list[str]:
            there = sorted(names & links.keys())
            for name in there:
                _must_be(kind, name, links)
            return [f"link del dev {name}" for name in there]

        if names:
            self._apply(left)

    def taps(self) -> Mapping[str, str | None]:
        """See ports/network.py."""
        links = self._links("type", "tun")
        return {name: link.get("master") for name, link in links.items() if _is_tap(link)}

    def bridges(self) -> frozenset[str]:
        """See ports/network.py."""
        links = self._links("type", "bridge")
        return frozenset(name for name, link in links.items() if link.get("address") == bridge_mac(name))

    def strangers(self) -> Mapping[str, str]:
        """See ports/network.py."""
        found = {}
        for name, link in self._links().items():
            if tap_uid(name) is not None and not _is_tap(link):
                found[name] = "it is no TAP that belongs to the user of that place"
            elif (mac := bridge_mac(name)) and not (_is_bridge(link) and link.get("address") == mac):
                found[name] = f"it is no bridge with the address {mac}"
        return found

    def states(self) -> Mapping[str, BridgeState]:
        """See ports/network.py."""
        links = self._links(kind="addr")
        return {
            name: BridgeState(
                "UP" in link.get("flags", ()),
                tuple(f"{a['local']}/{a['prefixlen']}" for a in link.get("addr_info", ()) if a["family"] == "inet"),
                tuple(sorted(port for port, other in links.items() if other.get("master") == name)),
            )
            for name, link in links.items()
            if bridge_mac(name) and _is_bridge(link)
        }

    def addresses(self) -> frozenset[str]:
        """See ports/network.py."""
        links = self._links(kind="addr").values()
        return frozenset(a["local"] for link in links for a in link.get("addr_info", ()) if a["family"] == "inet")

    def has(self, interface: str) -> bool:
        """See ports/network.py."""
        return interface in self._links()

    def _links(self, *which: str, kind: str = "link") -> Links:
        try:
            text = self._shell.run(["ip", "-j", "-d", kind, "show", *which]).stdout
        except Failed as error:
            raise _network_failed(error) from None
        return {link["ifname"]: link for link in json.loads(text or "[]") if link}  # ip prints {} for what it left out

    def _apply(self, plan: Callable[[Links], list[str]]) -> None:
        """Run what `plan` says of the links that are there, until the kernel takes all of it."""
        for left in reversed(range(_TRIES)):
            commands = plan(self._links())
            try:
                self._batch(commands)
            except _KernelSaid as error:
                if not left or "Exchange full" in error.message:
                    raise _network_failed(error) from None
            else:
                return

    def _batch(self, commands: Sequence[str]) -> None:
        if not commands:
            return
        try:
            self._shell.run(["ip", "-batch", "-"], stdin="\n".join(commands) + "\n")
        except Failed as error:
            if error.code != "shell.failed":
                raise
            raise _KernelSaid(error.code, error.message) from None


class _KernelSaid(Failed):
    """A batch stopped at a command that the kernel refused."""


def _bridge_up(network: TenantNetwork) -> list[str]:
    """Commands for a bridge that exists; the first one fails unless it is a bridge.

    Its MAC is fixed, or it would follow its ports as they come and go and leave guests with stale neighbours.
    """
    name, mac = network.bridge, network.mac(_GATEWAY_OFFSET)
    return [
        f"link set dev {name} address {mac} addrgenmode none up type bridge stp_state 0",
        f"addr replace {network.gateway}/{network.subnet.prefixlen} dev {name}",
        f"addr replace {METADATA}/32 dev {name}",
    ]


def _tap_made(network: TenantNetwork, offset: int) -> list[str]:
    owner = network.uid(offset)
    return [f"tuntap add dev {network.tap(offset)} mode tap user {owner} group {owner}"]


def _tap_up(network: TenantNetwork, offset: int) -> list[str]:
    """The TAP is a port of the bridge, and its guest has a place among the neighbours that no other takes."""
    bridge, place = network.bridge, f"{network.ip(offset)} lladdr {network.mac(offset)}"
    return [
        f"link set dev {network.tap(offset)} master {bridge} addrgenmode none up",
        f"neigh replace {place} dev {bridge} nud permanent",
    ]


def _is_bridge(link: Mapping[str, Any]) -> bool:
    return bool(link.get("linkinfo", {}).get("info_kind") == "bridge")


def _is_tap(link: Mapping[str, Any]) -> bool:
    """One of ours: it belongs to the user of the place that it is named after."""
    info, uid = link.get("linkinfo", {}), tap_uid(link["ifname"])
    data = info.get("info_data", {})
    return bool(
        info.get("info_kind") == "tun" and data.get("type") == "tap" and uid is not None and data.get("user") == uid
    )


def _must_be(kind: Callable[[Mapping[str, Any]], bool], name: str, links: Links) -> None:
    if name in links and not kind(links[name]):
        raise NotAllowed(
            "network.foreign", f"interface {name} was not made by mvm",
            hint=f"rename or remove it; see: ip -d link show {name}", interface=name,
        )  # fmt: skip


def _network_failed(error: Failed) -> Failed:
    if error.code == "shell.missing":
        return error
    hint = "are you root, and is the kernel's bridge module there?"
    if "Exchange full" in error.message:
        hint = f"a bridge has {_BRIDGE_PORTS} ports, so a tenant has at most as many instances on a node"
    return Failed("network.failed", f"the network could not be changed: {error.message}", hint=hint)
