"""A program that makes system calls one after the other, whatever comes of them, and tells what each returned."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from mvm.drivers.syscalls import Call, Data, encoded, executable

_SIZE = struct.Struct("<q")


def program(calls: Sequence[Call]) -> bytes:
    """It writes what the calls returned to its standard output."""
    data = Data()
    results = data.put(bytes(8 * len(calls)) + b"results")
    code = b""
    for number, call in enumerate(calls):
        code += encoded(call, data) + b"\x48\x89\x04\x25" + struct.pack("<I", results + 8 * number)  # mov [..], rax
    code += encoded(Call("tell", 1, (1, results, 8 * len(calls))), data)
    return executable(bytes(data.bytes), code + encoded(Call("end", 231, (0,)), data))


def returned(output: bytes) -> list[int]:
    """What its calls returned."""
    return [value for (value,) in _SIZE.iter_unpack(output)]
