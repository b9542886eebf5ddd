"""What a guest wrote on its console, made fit for a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvm.domain.layout import StateLayout
from mvm.drivers.qemu.driver import QemuDriver
from mvm.drivers.shell import LocalShell


@pytest.fixture
def vmm(tmp_path: Path) -> QemuDriver:
    return QemuDriver(StateLayout(tmp_path / "state"), LocalShell())


def write(at: Path, data: bytes) -> None:
    (at / "console.log").write_bytes(data)


def test_the_last_lines(vmm: QemuDriver, tmp_path: Path) -> None:
    write(tmp_path, b"".join(b"line %d\r\n" % number for number in range(100)))
    assert vmm.console_tail(tmp_path, lines=2) == "line 98\nline 99"
    assert vmm.console_tail(tmp_path, lines=0) == ""
    assert len(vmm.console_tail(tmp_path, lines=1000).splitlines()) == 100


def test_of_a_panic_the_reason_and_what_led_to_it(vmm: QemuDriver, tmp_path: Path) -> None:
    before = b"".join(b"before %d\n" % number for number in range(50))
    write(tmp_path, before + b"[1.0] Kernel panic - not syncing: why\n" + b"registers\n" * 50)
    tail = vmm.console_tail(tmp_path, lines=12).splitlines()
    assert len(tail) == 12
    assert tail[-3] == "[1.0] Kernel panic - not syncing: why"
    assert tail[0] == "before 41"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"\x1b[31mred\x1b[0m", "red"),
        (b"\x1b]0;title\x07text", "0;title" + "text"),
        (b"a\x00\x08\x7fb\xc2\x9bc", "abc"),
        ("grün ✓".encode(), "grün ✓"),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_no_control_character_comes_through(vmm: QemuDriver, tmp_path: Path, raw: bytes, shown: str) -> None:
    write(tmp_path, raw)
    assert vmm.console_tail(tmp_path, lines=5) == shown
    assert vmm.console(tmp_path, offset=0)[0] == shown


def test_following(vmm: QemuDriver, tmp_path: Path) -> None:
    write(tmp_path, b"x" * 70_000 + "ü".encode())
    text, offset = vmm.console(tmp_path, offset=0)
    assert (len(text), offset) == (65536, 65536)
    text, offset = vmm.console(tmp_path, offset=offset)
    assert (text, offset) == ("x" * (70_000 - 65536) + "ü", 70_002)
    assert vmm.console(tmp_path, offset=offset) == ("", offset)


def test_a_character_cut_in_two_comes_whole(vmm: QemuDriver, tmp_path: Path) -> None:
    write(tmp_path, b"x" * 65535 + "ü".encode())
    text, offset = vmm.console(tmp_path, offset=0)
    assert (set(text), offset) == ({"x"}, 65535)
    assert vmm.console(tmp_path, offset=offset) == ("ü", 65537)


def test_a_new_run_is_followed_from_its_start(vmm: QemuDriver, tmp_path: Path) -> None:
    write(tmp_path, b"new")
    assert vmm.console(tmp_path, offset=1000) == ("new", 3)


def test_a_flooded_console_gives_back_its_space_and_goes_on(vmm: QemuDriver, tmp_path: Path) -> None:
    write(tmp_path, b"early\n" + b"flood\n" * 200_000 + b"late\n")
    (tmp_path / "vmm.log").write_bytes(b"qemu: virtio: bogus descriptor\n" * 50_000)
    _, offset = vmm.console(tmp_path, offset=0)
    vmm.trim_console(tmp_path, keep=8192)
    for name in ("console.log", "vmm.log"):
        assert (tmp_path / name).stat().st_blocks * 512 <= 8192 + 4096
    text, behind = vmm.console(tmp_path, offset=0)
    assert behind > offset
    assert len(text) <= 8192 + 4096
    assert text.endswith("flood\nlate\n")
    assert vmm.console(tmp_path, offset=behind) == ("", behind)
    with (tmp_path / "console.log").open("ab") as file:
        file.write(b"more\n")
    assert vmm.console(tmp_path, offset=behind)[0] == "more\n"
    vmm.trim_console(tmp_path / "none", keep=1)
