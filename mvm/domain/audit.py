"""The audit trail: one line an entry, each with the hash of the one before it, so that no change of it stays unseen.

A line is an object in JSON's shortest spelling: ``seq`` and ``prev`` first, ``hash`` last. The hash is the sha256 of
the line without it. It is of these very bytes, so that any other spelling of the same entry is found too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

from mvm.domain.ids import JobId, NodeId, Revision, TenantId
from mvm.domain.job import Job
from mvm.domain.pool import WorkerPool
from mvm.domain.tenant import Tenant
from mvm.errors import InvalidInput

_LONGEST_TEXT = 512
_LONGEST_VALUE = 80
_WORKLOADS_OWN = frozenset({"user_data"})
"""Settings that may hold anything, a password too, however short they are."""
_HASH_KEY = b',"hash":"'
_SUFFIX = len(_HASH_KEY) + 64 + len('"}')


class Link(NamedTuple):
    """A place in a chain: the number and the hash of its last entry."""

    seq: int
    hash: str


START = Link(0, "0" * 64)
"""Before the first entry."""


class Kind(StrEnum):
    """What an entry tells of."""

    JOB = "job"  # how a job ended, and what it changed
    SWEEP = "sweep"  # a change that a sweep or a reconcile made without a job of its own
    CALL = "call"  # a change that somebody made through the agent, without a job
    RECOVERED = "recovered"  # half a line that a crash had left was cut off


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Who, why, what, from and to, with which image and configuration, and how it ended. Never an error's text.

    `cut` tells of the bytes that a recovery took away.
    """

    at: datetime
    node_id: NodeId
    kind: Kind
    actor: str
    reason: str
    verb: str
    subject: str
    result: str
    why: str | None = None
    code: str | None = None
    job_id: JobId | None = None
    parent: JobId | None = None
    before: str | None = None
    after: str | None = None
    generation: int | None = None
    revision: Revision | None = None
    config: str | None = None
    cut: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without its place in the chain."""
        return {
            "at": self.at.isoformat(),
            "kind": self.kind.value,
            "job_id": self.job_id,
            "parent": self.parent,
            "actor": _short(self.actor),
            "reason": self.reason,
            "why": _short(self.why) if self.why is not None else None,
            "verb": self.verb,
            "subject": _short(self.subject),
            "from": self.before,
            "to": self.after,
            "generation": self.generation,
            "revision": self.revision,
            "config": self.config,
            "result": self.result,
            "code": self.code,
            "node_id": self.node_id,
            **({"cut": dict(self.cut)} if self.cut is not None else {}),
        }


def chained(entry: AuditEntry, last: Link) -> tuple[str, Link]:
    """The line of `entry` behind `last`, without its line break, and the place it takes."""
    body = _spell({"seq": last.seq + 1, "prev": last.hash, **entry.to_dict()})
    digest = sha256(body.encode()).hexdigest()
    return f'{body[:-1]},"hash":"{digest}"}}', Link(last.seq + 1, digest)


def read_line(line: bytes) -> dict[str, Any] | None:
    """The entry with its place, if the line is whole and has the hash that it names."""
    if line[-_SUFFIX:-66] != _HASH_KEY or line[-2:] != b'"}':
        return None
    if sha256(line[:-_SUFFIX] + b"}").hexdigest().encode() != line[-66:-2]:
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    known = isinstance(entry, dict) and type(entry.get("seq")) is int and isinstance(entry.get("prev"), str)
    return entry if known else None


def tenant_of(job: Job) -> TenantId | None:
    """Whose trail `job` belongs into; sweeps, and jobs whose subject is no name, are in none."""
    if job.verb.value.partition(".")[0] not in ("tenant", "pool", "instance"):
        return None
    try:
        return TenantId(job.subject.partition("/")[0])
    except InvalidInput:
        return None


def told(
    before: Mapping[str, Any], after: Mapping[str, Any], asked: Iterable[str] = ()
) -> tuple[str | None, str | None]:
    """What two JSON forms of one thing differ in, as an entry's `before` and `after`: ``pinned=false`` and so on.

    Settings that were `asked` for are named in any case. Of a workload's own text, and of any other that is long, there
    is only a hash.
    """
    old, new = _flat(before), _flat(after)
    names = [name for name in new if old.get(name) != new[name] or any(name.split(".")[0] == each for each in asked)]
    return _listed(old, names), _listed(new, names)


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in value.items():
        found |= _flat(each, f"{above}{name}.") if isinstance(each, Mapping) else {f"{above}{name}": each}
    return found


def _listed(values: Mapping[str, Any], names: Iterable[str]) -> str | None:
    return " ".join(f"{name}={_plain(name, values[name])}" for name in names if name in values) or None


def _plain(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    hidden = bool(text) and name in _WORKLOADS_OWN
    return f"sha256:{sha256(text.encode()).hexdigest()[:16]}" if hidden or len(text) > _LONGEST_VALUE else text


_NOT_CONFIGURED = {"ref", "node_id", "created_at", "desired", "revision", "built"}


@lru_cache(256)
def config_hash(owner: Tenant | WorkerPool) -> str:
    """Of a tenant's quota, or of a pool's configuration without its name, place, counts and revision."""
    if isinstance(owner, Tenant):
        config: Mapping[str, Any] = owner.quota.to_dict()
    else:
        config = {name: value for name, value in owner.to_dict().items() if name not in _NOT_CONFIGURED}
    return sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def cut_off(half: bytes) -> dict[str, Any]:
    """What a recovery tells of the bytes that it takes away."""
    text = half[:_LONGEST_TEXT].decode("ascii", errors="backslashreplace")
    return {"bytes": len(half), "sha256": sha256(half).hexdigest(), "text": text}


def _spell(values: Mapping[str, Any]) -> str:
    return json.dumps(values, separators=(",", ":"))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."


# --- verifying


class Problem(StrEnum):
    """What can be wrong with a trail."""

    EDITED = "edited"
    REPLACED = "replaced"
    REMOVED = "removed"
    MOVED = "moved"
    REPEATED = "repeated"
    ADDED = "added"
    HALF = "half"
    UNKNOWN_END = "unknown end"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong: in which file, at which line of it (0: behind its end), with which entry."""

    file: str
    line: int
    seq: int | None
    problem: Problem
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many entries are there, where the chain ends, and what is wrong with it."""

    entries: int
    last: Link
    findings: tuple[Finding, ...]


def verify(files: Iterable[tuple[str, bytes]], head: Link | None) -> Verdict:
    """Look along a trail, its files in order, and compare its end with `head`, which is kept elsewhere.

    No change of its bytes goes unseen; one change may be told by more than one finding.
    """
    check, name = _Check(), ""
    for name, data in files:
        *lines, half = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            if not check.follows(line):
                check.look(line, name, number)
            check.before = (name, number)
        if half:
            check.find(name, len(lines) + 1, check.seq + 1, Problem.HALF,
                       f"{len(half)} bytes without a line's end: left by a crash, or by hand")  # fmt: skip
    check.end(name, head)
    found = sorted(check.findings, key=lambda f: (f.file, f.line or 1 << 60))
    return Verdict(check.entries, Link(check.seq, check.hash or ""), tuple(found))


class _Check:
    """Goes along a trail. `hash` is None behind a line whose own hash cannot be trusted."""

    def __init__(self) -> None:
        self.seq = START.seq
        self.hash: str | None = START.hash
        self.entries = 0
        self.before = ("", 0)
        self.findings: list[Finding] = []
        self._gaps: list[tuple[int, int, str, int]] = []

    def find(self, file: str, line: int, seq: int | None, problem: Problem, detail: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(file, line, seq, problem, detail))

    def follows(self, line: bytes) -> bool:
        """Whether `line` is the whole and right next one; then it is gone by. The way of nearly all lines."""
        if not line.startswith(b'{"seq":%d,"prev":"%s",' % (self.seq + 1, (self.hash or "").encode())):
            return False
        digest = sha256(line[:-_SUFFIX] + b"}").hexdigest()
        if line[-_SUFFIX:] != b'%s%s"}' % (_HASH_KEY, digest.encode()):
            return False
        self.seq, self.hash = self.seq + 1, digest
        self.entries += 1
        return True

    def look(self, line: bytes, file: str, number: int) -> None:
        """A line that is not the one to come: say what it is."""
        entry = read_line(line)
        self.entries += 1
        if entry is None:
            self.find(file, number, self.seq + 1, Problem.EDITED, "it does not have the hash that it names")
            self.seq, self.hash = self.seq + 1, None
            return
        seq: int = entry["seq"]
        if seq <= self.seq:
            if self._fill_gap(seq):
                self.find(file, number, seq, Problem.MOVED, f"entry {seq} stands behind entry {self.seq}")
            else:
                self.find(file, number, seq, Problem.REPEATED, f"entry {seq} was before; this is not its place")
            return
        if seq > self.seq + 1:
            self._gaps.append((self.seq + 1, seq - 1, file, number))
        elif self.hash is not None and entry["prev"] != self.hash:
            at_file, at_line = self.before
            if at_line:
                self.find(at_file, at_line, self.seq, Problem.REPLACED,
                          f"it has a right hash, but not the one that entry {seq} follows")  # fmt: skip
            else:
                self.find(file, number, seq, Problem.REPLACED, "it is the first and does not begin a chain")
        self.seq, self.hash = seq, entry["hash"]

    def _fill_gap(self, seq: int) -> bool:
        for at, (low, high, file, line) in enumerate(self._gaps):
            if low <= seq <= high:
                rest = [(low, seq - 1, file, line), (seq + 1, high, file, line)]
                self._gaps[at : at + 1] = [gap for gap in rest if gap[0] <= gap[1]]
                return True
        return False

    def end(self, file: str, head: Link | None) -> None:
        """No more lines: what did not turn up is gone, and the last one must be the head."""
        for low, high, at_file, at_line in self._gaps:
            self.find(at_file, at_line, low, Problem.REMOVED, f"{_entries(low, high)} missing before this line")
        if head is None:
            if self.entries:
                self.find(file, 0, self.seq, Problem.UNKNOWN_END,
                          "the node's store does not know this trail: entries may be missing at its end")  # fmt: skip
        elif self.seq < head.seq:
            missing = _entries(self.seq + 1, head.seq)
            self.find(file, 0, self.seq + 1, Problem.REMOVED, f"{missing} missing at the end")
        elif self.seq > head.seq:
            self.find(*self.before, self.seq, Problem.ADDED, f"the node's store knows of entries up to {head.seq} only")
        elif self.hash is not None and self.hash != head.hash:
            self.find(*self.before, self.seq, Problem.REPLACED,
                      "it has a right hash, but not the one that the node's store knows")  # fmt: skip


def _entries(low: int, high: int) -> str:
    return f"entry {low} is" if low == high else f"entries {low} to {high} are"
