"""Manifests, and what they refuse."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.ids import Revision
from mvm.domain.snapshot import (
    FORMAT,
    Compression,
    DiskState,
    FileDigest,
    Kind,
    SnapshotId,
    SnapshotManifest,
    other_version,
    refusal,
)
from mvm.errors import Failed

HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
SIZES = st.integers(0, 2**62)


def make(kind: Kind = Kind.TEMPLATE, **changes: object) -> SnapshotManifest:
    made = SnapshotManifest(
        kind=kind, owner=None, files={"memory": FileDigest("0" * 64, 4096)}, vmm="qemu", vmm_version="7.2.22",
        machine="m" * 64,
        mem_mib=256, vcpus=1, revision=Revision("1" * 64), template=None, compression=Compression.NONE,
        guest_protocol=2, disk=None, taken_at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


TEMPLATE = make()
DISK = DiskState(65536, 17)
DELTA = make(Kind.DELTA, owner="acme/web/i-00000001", template=TEMPLATE.id, disk=DISK, compression=Compression.ZSTD)
HERE = {"owner": DELTA.owner, "vmm": "qemu", "machine": "m" * 64, "revision": Revision("1" * 64), "guest_protocol": 2}


@st.composite
def manifests(draw: st.DrawFn) -> SnapshotManifest:
    return SnapshotManifest(
        kind=draw(st.sampled_from(Kind)),
        owner=draw(st.none() | st.text()),
        files=draw(st.dictionaries(st.text(), st.builds(FileDigest, HEX, SIZES))),
        vmm=draw(st.text()),
        vmm_version=draw(st.text()),
        machine=draw(HEX),
        mem_mib=draw(SIZES),
        vcpus=draw(SIZES),
        revision=Revision(draw(HEX)),
        template=draw(st.none() | HEX.map(SnapshotId)),
        compression=draw(st.sampled_from(Compression)),
        guest_protocol=draw(SIZES),
        disk=draw(st.none() | st.builds(DiskState, SIZES, SIZES)),
        taken_at=draw(st.datetimes(timezones=st.just(UTC))),
    )


@given(manifests())
def test_what_is_written_is_read(manifest: SnapshotManifest) -> None:
    again = SnapshotManifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.id == manifest.id


@given(manifests(), manifests())
def test_an_id_stands_for_all_of_it(one: SnapshotManifest, other: SnapshotManifest) -> None:
    assert (one.id == other.id) == (one == other)


@given(manifests(), st.data())
def test_a_manifest_that_was_changed_is_no_manifest_or_another(manifest: SnapshotManifest, data: st.DataObject) -> None:
    raw = bytearray(manifest.to_json())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(ValueError):
        assert SnapshotManifest.from_json(bytes(raw)).id != manifest.id


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b"\xff", b'"x"', b"[" * 100_000, b'{"kind": []}'])
def test_nonsense_is_no_manifest(raw: bytes) -> None:
    with pytest.raises(ValueError):
        SnapshotManifest.from_json(raw)


def test_another_form_of_the_same_is_no_manifest() -> None:
    with pytest.raises(ValueError, match="form"):
        SnapshotManifest.from_json(json.dumps(json.loads(DELTA.to_json()), indent=1).encode())


def test_what_fits_is_not_refused() -> None:
    assert refusal(TEMPLATE, **HERE | {"owner": None}, template=None, disk=None) is None  # type: ignore[arg-type]
    assert refusal(DELTA, **HERE, template=TEMPLATE, disk=DISK) is None  # type: ignore[arg-type]
    assert other_version(DELTA, "7.2.22") is None


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"owner": "acme/web/i-00000002"}, "snapshot.other_instance", "i-00000001 and is acme/web/i-00000002"),
        ({"vmm": "other"}, "snapshot.other_vmm", "the VMM was qemu and is other"),
        ({"machine": "n" * 64}, "snapshot.other_machine", "was mmmmmmmmmmmm and is nnnnnnnnnnnn"),
        ({"revision": Revision("2" * 64)}, "snapshot.other_revision", "was 111111111111 and is 222222222222"),
        ({"template": None}, "snapshot.other_base", "and is none"),
        ({"template": make(mem_mib=1)}, "snapshot.other_base", "the template was"),
        ({"guest_protocol": 3}, "snapshot.other_guest", "was 2 and is 3"),
        ({"disk": DISK._replace(mtime_ns=18)}, "snapshot.other_disk", "written at 18 ns"),
        ({"disk": None}, "snapshot.other_disk", "and is none"),
    ],
)
def test_what_differs_is_named(changes: dict[str, object], code: str, words: str) -> None:
    why = refusal(DELTA, **{**HERE, "template": TEMPLATE, "disk": DISK, **changes})  # type: ignore[arg-type]
    assert why is not None
    assert why.code == code
    assert words in why.reason


def test_another_format_or_version_is_refused() -> None:
    why = refusal(replace(TEMPLATE, format=0), **HERE, template=None, disk=None)  # type: ignore[arg-type]
    assert why is not None
    assert why.code == "snapshot.other_format"
    version = other_version(DELTA, "8.0.0")
    assert version is not None
    assert (version.code, version.reason) == ("snapshot.other_vmm", "the VMM's version was 7.2.22 and is 8.0.0")


def test_a_newer_format_is_told_from_damage() -> None:
    """It may have any fields, and is whole."""
    newer = json.loads(DELTA.to_json()) | {"format": FORMAT + 1, "something": "new"}
    with pytest.raises(Failed) as caught:
        SnapshotManifest.from_json(json.dumps(newer).encode())
    assert caught.value.code == "snapshot.other_format"
    assert "newer" in caught.value.hint


@pytest.mark.parametrize(("made", "oldest", "fits"), [(2, None, True), (1, 1, True), (1, 2, False), (3, 1, False)])
def test_a_guest_of_an_older_protocol_that_is_still_served_wakes(made: int, oldest: int | None, fits: bool) -> None:
    asleep = replace(DELTA, guest_protocol=made)
    refused = refusal(asleep, template=TEMPLATE, disk=DELTA.disk, oldest_guest=oldest, **HERE)  # type: ignore[arg-type]
    assert (refused is None) is fits
