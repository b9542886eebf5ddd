"""The chain of an audit trail: every change of it is found."""

from __future__ import annotations

import json
import random
from datetime import timedelta
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.audit import (
    START,
    AuditEntry,
    Kind,
    Link,
    Problem,
    Verdict,
    chained,
    config_hash,
    read_line,
    tenant_of,
    verify,
)
from mvm.domain.ids import TenantId
from mvm.domain.job import JobVerb
from mvm.domain.pool import DesiredCounts, ImageSource, InstanceResources, SleepPolicy, WorkerPool
from tests.support import make
from tests.support import strategies as some

texts = st.text(max_size=40)
entries = st.builds(
    AuditEntry, some.times, some.node_ids, st.sampled_from(Kind), texts, texts, texts, texts, texts,
    st.none() | texts, st.none() | texts, st.none() | some.job_ids, st.none() | some.job_ids, st.none() | texts,
    st.none() | texts, st.none() | st.integers(0, 99), st.none() | some.revisions, st.none() | texts,
    st.none() | some.json_objects,
)  # fmt: skip


def entry(number: int) -> AuditEntry:
    job = make.job()
    return AuditEntry(
        at=make.START + timedelta(seconds=number), node_id=make.NODE, kind=Kind.JOB, actor="ann", reason="manual",
        verb="instance.start", subject=job.subject, result="succeeded", job_id=job.job_id, before="ready",
        after="running", generation=3, revision=None, config="c" * 64,
    )  # fmt: skip


def written(count: int) -> tuple[list[bytes], Link]:
    lines, last = [], START
    for number in range(count):
        line, last = chained(entry(number), last)
        lines.append(line.encode())
    return lines, last


def check(lines: list[bytes], head: Link | None) -> Verdict:
    return verify([("1", b"".join(line + b"\n" for line in lines))], head)


def told(lines: list[bytes], head: Link | None) -> list[tuple[Problem, int, int | None]]:
    return [(f.problem, f.line, f.seq) for f in check(lines, head).findings]


@given(st.lists(entries, max_size=6))
def test_what_is_written_is_whole_and_can_be_read(made: list[AuditEntry]) -> None:
    lines, last = [], START
    for each in made:
        line, last = chained(each, last)
        lines.append(line.encode("ascii"))
        assert "\n" not in line
        read = read_line(line.encode())
        assert read is not None
        assert {name: read[name] for name in each.to_dict()} == json.loads(json.dumps(each.to_dict()))
        assert Link(read["seq"], read["hash"]) == last
    assert check(lines, last) == Verdict(len(made), last, ())


LINES, HEAD = written(12)


def test_an_edited_line_is_named() -> None:
    edited = [line.replace(b"ann", b"bob") if at == 4 else line for at, line in enumerate(LINES)]
    assert told(edited, HEAD) == [(Problem.EDITED, 5, 5)]


def test_a_line_edited_with_its_hash_is_named() -> None:
    fields = json.loads(LINES[4])
    forged = chained(entry(99), Link(4, fields["prev"]))[0].encode()
    assert told([*LINES[:4], forged, *LINES[5:]], HEAD) == [(Problem.REPLACED, 5, 5)]
    last = chained(entry(99), Link(11, json.loads(LINES[11])["prev"]))[0].encode()
    assert told([*LINES[:11], last], HEAD) == [(Problem.REPLACED, 12, 12)]


def test_removed_lines_are_named_wherever_they_were() -> None:
    assert told(LINES[1:], HEAD) == [(Problem.REMOVED, 1, 1)]
    assert told([*LINES[:4], *LINES[7:]], HEAD) == [(Problem.REMOVED, 5, 5)]
    assert "entries 5 to 7 are missing" in check([*LINES[:4], *LINES[7:]], HEAD).findings[0].detail
    assert told(LINES[:10], HEAD) == [(Problem.REMOVED, 0, 11)]
    assert told([], HEAD) == [(Problem.REMOVED, 0, 1)]


def test_reordered_and_repeated_lines_are_named() -> None:
    swapped = [*LINES[:4], LINES[5], LINES[4], *LINES[6:]]
    assert told(swapped, HEAD) == [(Problem.MOVED, 6, 5)]
    assert told([*LINES[:5], LINES[4], *LINES[5:]], HEAD) == [(Problem.REPEATED, 6, 5)]
    assert told([*LINES, LINES[0]], HEAD) == [(Problem.REPEATED, 13, 1)]


def test_added_lines_and_half_ones_are_named() -> None:
    more = chained(entry(99), HEAD)[0].encode()
    assert told([*LINES, more], HEAD) == [(Problem.ADDED, 13, 13)]
    half = verify([("1", b"\n".join(LINES) + b"\n" + more[:50])], HEAD)
    assert [(f.problem, f.line) for f in half.findings] == [(Problem.HALF, 13)]
    assert told([*LINES[:3], b"", *LINES[3:]], HEAD)[0] == (Problem.EDITED, 4, 4)


def test_a_trail_whose_end_nobody_knows_is_not_called_whole() -> None:
    assert told(LINES, None) == [(Problem.UNKNOWN_END, 0, 12)]
    assert told([], None) == []


def test_files_are_one_chain() -> None:
    parts = [b"".join(line + b"\n" for line in LINES[at : at + 4]) for at in (0, 4, 8)]
    files = [("1", parts[0]), ("2", parts[1]), ("3", parts[2])]
    assert verify(files, HEAD).findings == ()
    (gone,) = verify([files[0], files[2]], HEAD).findings
    assert (gone.file, gone.line, gone.seq, gone.problem) == ("3", 1, 5, Problem.REMOVED)
    assert verify([files[1], files[0], files[2]], HEAD).findings


def mutated(lines: list[bytes], rng: random.Random) -> tuple[str, list[bytes], set[int]]:
    """One random change, and the lines or entries of which one must be named."""
    at = rng.randrange(len(lines))
    kind = rng.choice(["edit", "delete", "insert byte", "swap", "remove", "repeat"])
    line = lines[at]
    byte = rng.randrange(len(line))
    if kind == "edit":
        other = bytes([rng.choice([b for b in range(256) if b not in (line[byte], 10)])])
        return kind, [*lines[:at], line[:byte] + other + line[byte + 1 :], *lines[at + 1 :]], {at + 1}
    if kind == "delete":
        return kind, [*lines[:at], line[:byte] + line[byte + 1 :], *lines[at + 1 :]], {at + 1}
    if kind == "insert byte":
        new = bytes([rng.choice([b for b in range(256) if b != 10])])
        return kind, [*lines[:at], line[:byte] + new + line[byte:], *lines[at + 1 :]], {at + 1}
    if kind == "swap":
        to = rng.choice([n for n in range(len(lines)) if n != at])
        swapped = list(lines)
        swapped[at], swapped[to] = swapped[to], swapped[at]
        return kind, swapped, {at + 1, to + 1}
    if kind == "remove":
        return kind, [*lines[:at], *lines[at + 1 :]], {at + 1}
    to = rng.randrange(len(lines) + 1)
    return kind, [*lines[:to], line, *lines[to:]], {at + 1}


@pytest.mark.parametrize("seed", range(3))
def test_each_of_a_thousand_changes_is_found_and_named(seed: int) -> None:
    rng = random.Random(seed)
    lines, head = written(40)
    seen = set()
    for _ in range(1000):
        kind, changed, where = mutated(lines, rng)
        findings = check(changed, head).findings
        assert findings, (kind, where)
        assert where & ({f.line for f in findings} | {f.seq for f in findings}), (kind, where, findings)
        seen.add(kind)
    assert len(seen) == 6


@given(st.integers(0, 11), st.data())
def test_any_change_of_bytes_is_found(at: int, data: st.DataObject) -> None:
    whole = b"".join(line + b"\n" for line in LINES)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 900)))
    put = data.draw(st.binary(max_size=20) | st.sampled_from(LINES).map(lambda line: line + b"\n"))
    changed = whole[:start] + put + whole[end:]
    assert bool(verify([("1", changed)], HEAD).findings) == (changed != whole)


def test_ten_thousand_entries_are_verified_in_well_under_a_second() -> None:
    lines, head = written(10_000)
    data = b"".join(line + b"\n" for line in lines)
    began = process_time()
    verdict = verify([("1", data)], head)
    took = process_time() - began
    assert verdict == Verdict(10_000, head, ())
    assert took < 1, took


def test_whose_trail_a_job_belongs_into() -> None:
    assert tenant_of(make.job(verb=JobVerb.TENANT_CREATE, subject="acme")) == TenantId("acme")
    assert tenant_of(make.job(verb=JobVerb.INSTANCE_WAKE, subject="acme/web/i-00000001")) == TenantId("acme")
    assert tenant_of(make.job(verb=JobVerb.SWEEP_ORPHANS, subject="n1")) is None
    assert tenant_of(make.job(verb=JobVerb.POOL_BUILD, subject="Not A Name/web")) is None


def test_a_configurations_hash_is_of_the_configuration_alone() -> None:
    pool = WorkerPool(make.WEB, ImageSource("builtin:", "minimal"), InstanceResources(), make.NODE, make.START)
    assert len(config_hash(pool)) == 64
    scaled = WorkerPool(
        make.WEB, ImageSource("builtin:", "minimal"), InstanceResources(), make.NODE, make.START,
        desired=DesiredCounts(running=3),
    )  # fmt: skip
    assert config_hash(scaled) == config_hash(pool)
    sleepier = WorkerPool(
        make.WEB, ImageSource("builtin:", "minimal"), InstanceResources(), make.NODE, make.START,
        sleep_policy=SleepPolicy(warm_after_s=1),
    )  # fmt: skip
    assert config_hash(sleepier) != config_hash(pool)
