"""Pages in files."""

from __future__ import annotations

from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvm.domain.snapshot import Compression
from mvm.drivers.qemu.packing import Packer, Unpacker

PAGE = 4096
PAGES = st.dictionaries(st.integers(0, 999), st.none() | st.binary(min_size=1, max_size=8))


def packed(pages: dict[int, bytes | None], how: Compression) -> tuple[bytes, bytes]:
    memory = BytesIO()
    packer = Packer(memory, how)
    for number, start in sorted(pages.items()):
        packer.add(number, None if start is None else start.ljust(PAGE, b"\1"))
    return packer.finish(), memory.getvalue()


@pytest.mark.parametrize("how", Compression)
@given(PAGES)
def test_what_was_packed_comes_out(how: Compression, pages: dict[int, bytes | None]) -> None:
    index, memory = packed(pages, how)
    found: dict[int, bytes | None] = {}
    for first, count, data in Unpacker(index, memory, how, 1000).runs():
        for number in range(count):
            found[first + number] = None if data is None else bytes(data[number * PAGE : (number + 1) * PAGE])
    assert found == {n: None if start is None else start.ljust(PAGE, b"\1") for n, start in pages.items()}
    assert len(list(Unpacker(index, memory, how, 1000).runs())) == len(index) // 12


def test_neighbours_are_one_run() -> None:
    index, memory = packed({3: b"a", 4: b"b", 5: None, 6: None, 9: b"c"}, Compression.NONE)
    runs = [(first, count, data is None) for first, count, data in Unpacker(index, memory, Compression.NONE, 10).runs()]
    assert runs == [(3, 2, False), (5, 2, True), (9, 1, False)]


@pytest.mark.parametrize("how", Compression)
def test_a_megabyte_and_more(how: Compression) -> None:
    pages: dict[int, bytes | None] = {number: b"%d" % number for number in range(600)}
    index, memory = packed(pages, how)
    ((first, count, data),) = Unpacker(index, memory, how, 600).runs()
    assert (first, count) == (0, 600)
    assert data is not None
    assert bytes(data[599 * PAGE : 599 * PAGE + 4]) == b"599\1"


def test_what_does_not_fit_is_refused() -> None:
    index, memory = packed({9: b"a"}, Compression.NONE)
    for pages, data in ((9, memory), (10, memory[:-1])):
        with pytest.raises(ValueError):
            list(Unpacker(index, data, Compression.NONE, pages).runs())
