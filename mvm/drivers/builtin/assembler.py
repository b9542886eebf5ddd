"""A small assembler for x86-64, for programs that need loops: no compiler is wanted where images are built.

What such a program remembers is in memory at fixed addresses; a system call takes its arguments from there, and leaves
its result in ``rax``. Instructions that are needed once are given as bytes, with their names beside them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

BASE = 0x400000  # where the file is mapped, as a whole
CODE_LIMIT = 0x1000
DATA = BASE + CODE_LIMIT

_ELF = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_HEADERS = _ELF.size + _SEGMENT.size
_READ_WRITE_EXECUTE = 7

_SET = (b"\xbf", b"\xbe", b"\xba", b"\x41\xba", b"\x41\xb8", b"\x41\xb9")  # mov edi esi edx r10d r8d r9d, 32 bits
_GET = (  # mov rdi rsi rdx r10 r8 r9, [32 bits]
    b"\x48\x8b\x3c\x25", b"\x48\x8b\x34\x25", b"\x48\x8b\x14\x25",
    b"\x4c\x8b\x14\x25", b"\x4c\x8b\x04\x25", b"\x4c\x8b\x0c\x25",
)  # fmt: skip
_SET_EAX = b"\xb8"
_SET_RAX = b"\x48\xc7\xc0"  # 32 bits with their sign
_SYSCALL = b"\x0f\x05"
_LOAD, _LOAD_16 = b"\x48\x8b\x04\x25", b"\x0f\xb7\x04\x25"  # mov rax, [...]; movzx eax, word [...]
_STORE, _STORE_32 = b"\x48\x89\x04\x25", b"\x89\x04\x25"
_STORE_IMMEDIATE = b"\x48\xc7\x04\x25"  # mov qword [...], 32 bits
_STORE_BYTE = b"\xc6\x04\x25"
_ADD, _COMPARE, _AND = b"\x48\x05", b"\x48\x3d", b"\x48\x25"  # rax, 32 bits
_ADD_MEMORY, _NEGATE = b"\x48\x03\x04\x25", b"\x48\xf7\xd8"
_CALL, _RETURN = b"\xe8", b"\xc3"


@dataclass(frozen=True, slots=True)
class Value:
    """What is at an address when the program comes there, 64 bits of it."""

    address: int


class When(Enum):
    """Whether a jump is made, by what `Assembler.compare` compared."""

    ALWAYS = b"\xe9"
    EQUAL = b"\x0f\x84"
    NOT_EQUAL = b"\x0f\x85"
    LESS = b"\x0f\x8c"
    LESS_OR_EQUAL = b"\x0f\x8e"
    GREATER = b"\x0f\x8f"
    NOT_BELOW = b"\x0f\x83"  # addresses


class Assembler:
    """Collects a program; `executable` is what has become of it."""

    def __init__(self) -> None:
        self._code = bytearray()
        self._data = bytearray()
        self._room = 0
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []

    # --- memory
    def constant(self, data: bytes) -> int:
        """The address at which the program has `data`. Constants come before variables."""
        assert not self._room, "what is in the file comes first"
        self._data += bytes(-len(self._data) % 8)
        at = DATA + len(self._data)
        self._data += data
        return at

    def variable(self, size: int = 8) -> int:
        """The address of `size` bytes, zero at first."""
        self._room += -(len(self._data) + self._room) % 8
        at = DATA + len(self._data) + self._room
        self._room += size
        return at

    # --- instructions
    def emit(self, code: str, *numbers: int) -> None:
        """Bytes in hexadecimal, and then `numbers` of 32 bits."""
        self._code += bytes.fromhex(code) + b"".join(struct.pack("<I", number) for number in numbers)

    def system_call(self, function: int, *arguments: int | Value) -> None:
        """Make it; ``rax`` is what it returned, negative for an error."""
        for place, argument in enumerate(arguments):
            if isinstance(argument, Value):
                self._code += _GET[place] + _u32(argument.address)
            else:
                self._code += _SET[place] + _u32(argument)
        self._code += _SET_EAX + _u32(function) + _SYSCALL

    def load(self, address: int) -> None:
        """64 bits into ``rax``."""
        self._code += _LOAD + _u32(address)

    def load_short(self, address: int) -> None:
        """16 bits into ``rax``."""
        self._code += _LOAD_16 + _u32(address)

    def set(self, number: int) -> None:
        """A number into ``rax``."""
        self._code += _SET_RAX + _u32(number)

    def store(self, address: int) -> None:
        """64 bits of ``rax``."""
        self._code += _STORE + _u32(address)

    def store_int(self, address: int) -> None:
        """32 bits of ``rax``."""
        self._code += _STORE_32 + _u32(address)

    def put(self, address: int, number: int) -> None:
        """A number, 64 bits."""
        self._code += _STORE_IMMEDIATE + _u32(address) + _u32(number)

    def put_byte(self, address: int, byte: bytes) -> None:
        """One byte."""
        self._code += _STORE_BYTE + _u32(address) + byte

    def add(self, number: int) -> None:
        """To ``rax``."""
        self._code += _ADD + _u32(number)

    def add_from(self, address: int) -> None:
        """To ``rax``, 64 bits."""
        self._code += _ADD_MEMORY + _u32(address)

    def negate(self) -> None:
        """``rax``."""
        self._code += _NEGATE

    def keep_bits(self, bits: int) -> None:
        """Of ``rax``; zero when it has none of them."""
        self._code += _AND + _u32(bits)

    def compare(self, number: int) -> None:
        """``rax`` with a number, for the jump that follows."""
        self._code += _COMPARE + _u32(number)

    # --- ways
    def label(self, name: str) -> None:
        """A place to jump to."""
        self._labels[name] = len(self._code)

    def jump(self, name: str, when: When = When.ALWAYS) -> None:
        """Go on at a label."""
        self._code += when.value
        self._reference(name)

    def call(self, name: str) -> None:
        """Go on at a label until `give_back`."""
        self._code += _CALL
        self._reference(name)

    def give_back(self) -> None:
        """Go on after the `call`."""
        self._code += _RETURN

    def _reference(self, name: str) -> None:
        self._jumps.append((len(self._code), name))
        self._code += bytes(4)

    def executable(self) -> bytes:
        """A static program that begins with the first instruction."""
        code = bytearray(self._code)
        for at, name in self._jumps:
            code[at : at + 4] = struct.pack("<i", self._labels[name] - at - 4)
        begin = BASE + _HEADERS
        assert _HEADERS + len(code) <= CODE_LIMIT, "the code has room before the data"
        header = _ELF.pack(
            b"\x7fELF\x02\x01\x01", 2, 62, 1,  # 64 bits, little-endian; an executable for x86-64
            begin, _ELF.size, 0, 0,  # where it begins, where the segments are told; no sections
            _ELF.size, _SEGMENT.size, 1, 0, 0, 0,
        )  # fmt: skip
        in_file = CODE_LIMIT + len(self._data)
        segment = _SEGMENT.pack(1, _READ_WRITE_EXECUTE, 0, BASE, BASE, in_file, in_file + self._room, 0x1000)
        return (header + segment + bytes(code)).ljust(CODE_LIMIT, b"\0") + bytes(self._data)


def _u32(number: int) -> bytes:
    return struct.pack("<I", number & 0xFFFFFFFF)
