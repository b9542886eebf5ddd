"""Pages in two files: an index of runs, and the pages' bytes one after the other, compressed as one stream.

The index is a sequence of ``first page, pages, kind`` in 4 bytes each, little-endian; of kind 0 are pages of zeros,
which have no bytes in the other file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import chain
from mmap import mmap
from typing import Any, Protocol, TypeAlias, cast

from mvm.domain.snapshot import Compression

_RUN = struct.Struct("<III")
_PAGE = 4096
_AT_ONCE = 1 << 20  # bytes
_AHEAD = 64 << 20  # bytes that may wait for being used
_ZEROS, _BYTES = 0, 1

Buffer: TypeAlias = bytes | memoryview | mmap
Run: TypeAlias = tuple[int, int, Buffer | None]
"""First page, number of pages, and their bytes, or None for zeros."""


class _Stream(Protocol):
    def compress(self, data: bytes) -> bytes: ...
    def flush(self) -> bytes: ...


class Sink(Protocol):
    """What pages are written to."""

    def write(self, data: bytes, /) -> Any:
        """Append."""


class Packer:
    """Takes pages in ascending order."""

    def __init__(self, memory: Sink, compression: Compression) -> None:
        self._memory = memory
        self._stream = _compressor(compression)
        self._runs: list[list[int]] = []
        self._waiting = bytearray()
        memory.write(_header(self._stream))

    def add(self, number: int, page: bytes | None) -> None:
        """One page; None if it is of zeros."""
        kind = _ZEROS if page is None else _BYTES
        last = self._runs[-1] if self._runs else [0, 0, -1]
        if last[2] == kind and last[0] + last[1] == number:
            last[1] += 1
        else:
            self._runs.append([number, 1, kind])
        if page is not None:
            self._waiting += page
            if len(self._waiting) >= _AT_ONCE:
                self._memory.write(self._stream.compress(bytes(self._waiting)))
                self._waiting.clear()

    def finish(self) -> bytes:
        """The index."""
        self._memory.write(self._stream.compress(bytes(self._waiting)))
        self._memory.write(self._stream.flush())
        return b"".join(_RUN.pack(*run) for run in self._runs)


class Unpacker:
    """What a `Packer` made. `runs` raises `ValueError` when it is not that, or beyond `pages`."""

    def __init__(self, index: bytes, memory: Buffer, compression: Compression, pages: int) -> None:
        self._index = index
        self._memory = memory
        self._compression = compression
        self._pages = pages

    def runs(self) -> Iterator[Run]:
        """In ascending order."""
        read = _reader(self._memory, self._compression)
        for first, count, kind in _RUN.iter_unpack(self._index):
            if first + count > self._pages or kind not in (_ZEROS, _BYTES):
                raise ValueError("a run lies beyond the memory")
            if kind == _ZEROS:
                yield first, count, None
                continue
            data = read(count * _PAGE)
            if len(data) != count * _PAGE:
                raise ValueError("pages are missing")
            yield first, count, data


def ahead(runs: Iterator[Run]) -> Iterator[Run]:
    """The same runs, the first of which have been unpacked when this returns."""
    ready: list[Run] = []
    size = 0
    for run in runs:
        ready.append(run)
        size += len(run[2] or b"")
        if size >= _AHEAD:
            break
    return chain(ready, runs)


class _Plain:
    def compress(self, data: bytes) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _compressor(compression: Compression) -> _Stream:
    match compression:
        case Compression.ZSTD:
            import zstandard

            return zstandard.ZstdCompressor(level=1).compressobj()
        case Compression.LZ4:
            import lz4.frame

            return cast(_Stream, lz4.frame.LZ4FrameCompressor(block_linked=True))
        case Compression.NONE:
            return _Plain()


def _header(stream: _Stream) -> bytes:
    """What some streams want to have written first."""
    begin = getattr(stream, "begin", None)
    return begin() if begin else b""


def _reader(data: Buffer, compression: Compression) -> Callable[[int], Buffer]:
    """Gives so many of the bytes, from the first on."""
    match compression:
        case Compression.ZSTD:
            import zstandard

            return zstandard.ZstdDecompressor().stream_reader(memoryview(data)).read
        case Compression.LZ4:
            import lz4.frame

            return BytesIO(lz4.frame.decompress(data)).read
        case Compression.NONE:
            return _slices(memoryview(data))


def _slices(view: memoryview) -> Callable[[int], memoryview]:
    """Without copying: a template's memory is large."""
    at = 0

    def read(size: int) -> memoryview:
        nonlocal at
        at += size
        return view[at - size : at]

    return read
