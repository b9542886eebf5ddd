"""Empty qcow2 images, written without a program: a start makes one.

Layout after the specification (``docs/interop/qcow2.txt`` in QEMU): the header, the refcount table, one refcount
block and the L1 table, each from a cluster of its own. An L1 of zeros says that nothing is allocated.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

CLUSTER_BITS = 16
_CLUSTER = 1 << CLUSTER_BITS
_REFCOUNT_ORDER = 4  # 16 bits each
_L1_COVERS = _CLUSTER * (_CLUSTER // 8)  # bytes of disk behind one L1 entry: an L2 table of 8-byte entries
_HEADER = struct.Struct(">4sI Q II Q I I Q Q I I Q QQQ I I")  # version 3, without its optional tail


def write_empty(file: BinaryIO, virtual_size: int) -> None:
    """Write an image of `virtual_size` bytes (of up to a few TiB) to the empty `file`.

    No backing file is named: who opens it says what lies below it. Raises `OSError`.
    """
    l1_entries = -(-virtual_size // _L1_COVERS)
    l1_clusters = max(1, -(-l1_entries * 8 // _CLUSTER))
    table, block, l1 = (at << CLUSTER_BITS for at in (1, 2, 3))
    header = _HEADER.pack(
        b"QFI\xfb", 3,
        0, 0,  # backing file: where its name is, and its length
        CLUSTER_BITS, virtual_size, 0,  # not encrypted
        l1_entries, l1, table, 1,  # the refcount table has one cluster
        0, 0,  # snapshots
        0, 0, 0,  # incompatible, compatible and autoclear features
        _REFCOUNT_ORDER, _HEADER.size,
    )  # fmt: skip
    clusters = 3 + l1_clusters
    file.write(header)
    file.seek(table)
    file.write(struct.pack(">Q", block))
    file.seek(block)
    file.write(struct.pack(f">{clusters}H", *[1] * clusters))
    file.truncate(clusters << CLUSTER_BITS)
