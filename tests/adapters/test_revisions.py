from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mvm.domain.ids import Revision
from mvm.domain.layout import StateLayout
from mvm.drivers.revisions import Revisions
from mvm.errors import Failed
from tests.support.revisions import build_revision


@pytest.fixture
def layout(tmp_path: Path) -> StateLayout:
    return StateLayout(tmp_path / "state")


@pytest.fixture
def revisions(layout: StateLayout) -> Revisions:
    return Revisions(layout)


@pytest.mark.parametrize("name", ["vmlinux", "initramfs.cpio", "rootfs.ext4", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "shorten", "lose"])
def test_damage_is_found_and_named(revisions: Revisions, layout: StateLayout, name: str, harm: str) -> None:
    built = build_revision(layout)
    revisions.verified(built)
    path = layout.revision(built) / name
    data = path.read_bytes()
    path.unlink()
    if harm == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "shorten":
        path.write_bytes(data[:-1])
    with pytest.raises(Failed) as damaged:
        revisions.verified(built)
    assert damaged.value.code == "revision.damaged"
    assert damaged.value.fields["file"] == name
    path.write_bytes(data)
    assert revisions.verified(built).rootfs.exists()


def test_a_manifest_that_lists_too_little_is_damage(revisions: Revisions, layout: StateLayout) -> None:
    for manifest in (b"{}", b"[]", b"no JSON", b'{"files": {"vmlinux": {"sha256": "00", "size": 6}}}'):
        revision = Revision(hashlib.sha256(manifest).hexdigest())
        layout.revision(revision).mkdir(parents=True)
        for name in ("vmlinux", "initramfs.cpio", "rootfs.ext4"):
            (layout.revision(revision) / name).write_bytes(b"kernel")
        (layout.revision(revision) / "manifest.json").write_bytes(manifest)
        with pytest.raises(Failed) as damaged:
            revisions.verified(revision)
        assert damaged.value.code == "revision.damaged"


def test_what_was_verified_is_not_read_again(
    revisions: Revisions, layout: StateLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_revision(layout)
    revisions.verified(built)

    def read(*_: object) -> None:
        raise AssertionError("it was read again")

    monkeypatch.setattr(hashlib, "file_digest", read)
    revisions.verified(built)
    (layout.revision(built) / "rootfs.ext4").touch()
    with pytest.raises(AssertionError):
        revisions.verified(built)
