"""Documents in requests: a frame holds one mebibyte, and a document packs to a small part of itself."""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode

from mvm.domain.document import MAX_BYTES, check_size, malformed


def packed(content: bytes) -> str:
    """`content` as a request carries it."""
    return b64encode(zlib.compress(content)).decode()


def unpacked(text: str) -> bytes:
    """Inverse of `packed`; raises `InvalidInput` (``desired.malformed``, ``desired.too_large``)."""
    unpacking = zlib.decompressobj()
    try:
        content = unpacking.decompress(b64decode(text, validate=True), MAX_BYTES + 1)
    except (ValueError, zlib.error):
        raise malformed("not packed as it should be", "the agent may be older than its caller") from None
    check_size(len(content))
    return content
