"""ext4 images with mkfs and debugfs: no root, no mount, the same bytes every time."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from mvm.drivers.builtin.tree import EPOCH, Entry, Tree
from mvm.errors import Failed
from mvm.ports.shell import Shell

_UUID = "6d766d00-0000-4000-8000-000000000001"
_HASH_SEED = "6d766d00-0000-4000-8000-000000000002"
_FEATURES = (
    "none,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,dir_nlink,extra_isize,metadata_csum,64bit"
)
_ENV = {
    "E2FSPROGS_FAKE_TIME": str(EPOCH),
    "SOURCE_DATE_EPOCH": str(EPOCH),
    "MKE2FS_CONFIG": "/dev/null",
    "LC_ALL": "C",
}
_BLOCK = 4096
_INODE = 256
_SPARE_INODES = 16384
_TIMES = ("atime", "ctime", "mtime", "crtime")


def write(tree: Tree, into: Path, *, free_mib: int, shell: Shell) -> None:
    """Write `tree` as a sparse image with about `free_mib` MiB free. It has no journal: it is never written to.

    Files are staged in a directory beside `into`, which is removed.
    """
    stage = into.with_name("stage")
    _stage(tree, stage)
    inodes = len(tree) + _SPARE_INODES
    content = sum(-len(entry.data) // _BLOCK * -_BLOCK for _, entry in tree.items())
    size_mib = ((content + inodes * _INODE + len(tree) * 64) * 102 // 100 >> 20) + free_mib + 1
    shell.run(
        ["mkfs.ext4", "-q", "-F", "-b", str(_BLOCK), "-I", str(_INODE), "-N", str(inodes), "-m", "0",
         "-L", "mvm-root", "-U", _UUID, "-O", _FEATURES, "-d", str(stage),
         "-E", f"hash_seed={_HASH_SEED},root_owner=0:0,lazy_itable_init=0,nodiscard,packed_meta_blocks=1",
         str(into), f"{size_mib}M"],
        env=_ENV,
    )  # fmt: skip
    shutil.rmtree(stage)
    _settle(tree, into, shell)


def _stage(tree: Tree, stage: Path) -> None:
    stage.mkdir()
    for path, entry in tree.items():
        target = stage / path
        if stat.S_ISDIR(entry.mode):
            target.mkdir()
        elif stat.S_ISLNK(entry.mode):
            target.symlink_to(os.fsdecode(entry.data))
        else:
            target.write_bytes(entry.data)


def _settle(tree: Tree, image: Path, shell: Shell) -> None:
    """Set what mkfs took from the staged files and from now: owners, modes, times."""
    commands = []
    for path, entry in [("", Entry(stat.S_IFDIR | 0o755)), ("lost+found", Entry(stat.S_IFDIR | 0o700)), *tree.items()]:
        fields = {"uid": "0", "gid": "0", "mode": f"0{entry.mode:o}", "generation": "0"}
        fields |= dict.fromkeys(_TIMES, f"@{EPOCH}") | {f"{name}_extra": "0" for name in _TIMES}
        commands += [f'sif "/{path}" {name} {value}' for name, value in fields.items()]
    commands.append("ssv kbytes_written 0")
    result = shell.run(["debugfs", "-w", "-f", "-", str(image)], stdin="\n".join(commands) + "\n", env=_ENV)
    lines = [line for line in (result.stderr + result.stdout).splitlines() if line and not line.startswith("debugfs")]
    if lines:  # debugfs says what failed and still ends with 0
        raise Failed("image.build_failed", f"debugfs: {lines[0]}", stderr="\n".join(lines[:20]))
