"""Image revisions without an image."""

from __future__ import annotations

import hashlib
import json

from mvm.domain.ids import Revision
from mvm.domain.layout import StateLayout


def build_revision(layout: StateLayout, rootfs: bytes = bytes(1 << 20)) -> Revision:
    """A revision as an image builder leaves it."""
    contents = {"vmlinux": b"kernel", "initramfs.cpio": b"initramfs", "rootfs.ext4": rootfs}
    listed = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in contents.items()}
    manifest = json.dumps({"files": listed}).encode()
    revision = Revision(hashlib.sha256(manifest).hexdigest())
    directory = layout.revision(revision)
    directory.mkdir(parents=True)
    for name, data in {**contents, "manifest.json": manifest}.items():
        (directory / name).write_bytes(data)
    return revision
