"""The packet filter by ``nft`` and netlink, in the network namespace of the calling thread."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import ndiff
from pathlib import Path

from mvm.domain.firewall import Change, Ruleset
from mvm.drivers.files import write_private
from mvm.drivers.nft_elements import Members
from mvm.errors import Failed
from mvm.ports.shell import Shell

_TABLES = ("bridge mvm", "inet mvm")
_BRIDGE = re.compile(r"br-tenant-[0-9]+")
_CONF = Path("/proc/sys/net/ipv4/conf")
_ALL = ("all", "default")
_EMPTY = "(empty)"
_LISTING = ["nft", "-s", "list", "ruleset"]
_WOULD_BE = ["unshare", "--net", "sh", "-c", "nft -f - && exec nft -s list ruleset"]


class Nftables:
    """ports/firewall.py. `mark` is a file that says which uplink forwards because of us."""

    def __init__(self, shell: Shell, mark: Path) -> None:
        self._shell = shell
        self._mark = mark
        self._members = Members()
        self._seen: tuple[Ruleset, Mapping[str, list[str]]] | None = None

    def apply(self, rules: Ruleset) -> None:
        """See ports/firewall.py."""
        self._nft(["nft", "-f", "-"], rules.commands())

    def change(self, change: Change) -> None:
        """See ports/firewall.py."""
        if change.chains or change.dropped:
            self._nft(["nft", "-f", "-"], change.commands())
            return
        try:
            self._members.change(change.elements, change.removed)
        except OSError as error:
            raise _refused(f"the kernel says: {error.strerror}") from None

    def remove(self) -> None:
        """See ports/firewall.py."""
        self._nft(["nft", "-f", "-"], [f"{verb} table {table}" for table in _TABLES for verb in ("add", "delete")])

    def differences(self, rules: Ruleset) -> Sequence[str]:
        """See ports/firewall.py. What `rules` look like is asked of nft, by way of an empty network namespace."""
        if self._seen is None or self._seen[0] != rules:
            self._seen = rules, parse(self._nft(_WOULD_BE, rules.commands()))
        wanted, found = self._seen[1], parse(self._nft(_LISTING, []))
        differences = []
        for part in sorted({*wanted, *found}):
            for line in ndiff(wanted.get(part, []), found.get(part, [])):
                if line[0] in "-+":
                    differences.append(f"{'missing' if line[0] == '-' else 'not ours'}: {part}: {line[2:]}")
        return differences

    def forward(self, bridges: frozenset[str], uplink: str) -> None:
        """See ports/firewall.py."""
        former = self._mark.read_text().strip() if self._mark.exists() else ""
        if former and former != uplink:
            self._set(former, "0")
            self._mark.unlink()
        if uplink and self._get(uplink) == "0":
            write_private(self._mark, uplink.encode())
            self._set(uplink, "1")
        for name in (path.name for path in _CONF.iterdir() if _BRIDGE.fullmatch(path.name)):
            wanted = "1" if name in bridges else "0"
            if self._get(name) != wanted:
                self._set(name, wanted)

    def forwarding(self) -> frozenset[str]:
        """See ports/firewall.py."""
        return frozenset(p.name for p in _CONF.iterdir() if p.name not in _ALL and self._get(p.name) == "1")

    def _get(self, interface: str) -> str:
        with suppress(OSError):
            return (_CONF / interface / "forwarding").read_text().strip()
        return ""

    def _set(self, interface: str, value: str) -> None:
        with suppress(FileNotFoundError):  # it has gone
            (_CONF / interface / "forwarding").write_text(value)

    def _nft(self, argv: Sequence[str], commands: Sequence[str]) -> str:
        try:
            return self._shell.run(argv, stdin="\n".join(commands) + "\n").stdout
        except Failed as error:
            missing = error.code == "shell.missing" or error.fields.get("exit_code") == 127
            if missing:
                raise Failed("firewall.missing", "there is no program nft", hint="apt-get install nftables") from None
            said = str(error.fields.get("stderr") or error.message).strip().splitlines()
            raise _refused(f"nft says: {said[0] if said else 'nothing'}") from None


def _refused(why: str) -> Failed:
    return Failed(
        "firewall.refused", f"the rules were refused; {why}",
        hint="are you root, and does the kernel have nf_tables, for bridges too? see: mvm doctor",
    )  # fmt: skip


def parse(listing: str) -> dict[str, list[str]]:
    """A listing by nft, part by part: the rules of our chains in their order, the members of our sets in ours."""
    parts: dict[str, list[str]] = {}
    table = part = ""
    for line in _whole_lines(listing):
        words = line.split()
        if words[0] == "table":
            table = " ".join(words[1:3])
        elif words[-1] == "{":
            part = f"{table} {words[1]}"
            parts.setdefault(part, [])
        elif words[0] == "elements":
            inside = line.partition("{")[2].rpartition("}")[0]
            parts[part] += sorted(member.strip() for member in inside.split(","))
        elif words[0] != "}" and part:
            parts[part].append(line)
    ours = tuple(f"{table} " for table in _TABLES)
    return {part: lines or [_EMPTY] for part, lines in parts.items() if part.startswith(ours)}


def _whole_lines(listing: str) -> list[str]:
    """Without blank lines and comments; a list of members that goes over several lines is one."""
    lines: list[str] = []
    for raw in listing.splitlines():
        line = raw.strip()
        if lines and lines[-1].startswith("elements") and not lines[-1].endswith("}"):
            lines[-1] += f" {line}"
        elif line and not line.startswith("#"):
            lines.append(line)
    return lines
