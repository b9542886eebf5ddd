from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvm.drivers.qcow2 import write_empty
from mvm.drivers.shell import LocalShell

shell = LocalShell()


@pytest.mark.parametrize("size", [512, 1 << 20, (64 << 20) + 512, 512 << 20, (512 << 20) + 1024, 5 << 40])
def test_an_empty_image_is_sound(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.qcow2"
    with path.open("w+b") as file:
        write_empty(file, size)
    check = json.loads(shell.run(["qemu-img", "check", "--output=json", str(path)]).stdout)
    assert check["check-errors"] == 0
    assert not {"corruptions", "leaks"} & check.keys()
    info = json.loads(shell.run(["qemu-img", "info", "--output=json", str(path)]).stdout)
    assert (info["format"], info["virtual-size"]) == ("qcow2", size)
    assert info["format-specific"]["data"]["compat"] == "1.1"
    assert "backing-filename" not in info
    assert path.stat().st_blocks * 512 <= 64 << 10


def test_it_shows_what_lies_below_and_keeps_what_is_written(tmp_path: Path) -> None:
    base, image, out = tmp_path / "base", tmp_path / "x.qcow2", tmp_path / "out"
    base.write_bytes(b"below" + bytes((3 << 20) - 5))
    with image.open("w+b") as file:
        write_empty(file, base.stat().st_size)
    opened = (
        f"driver=qcow2,file.driver=file,file.filename={image},"
        f"backing.driver=raw,backing.file.driver=file,backing.file.filename={base},backing.read-only=on"
    )
    shell.run(["qemu-io", "--image-opts", opened, "-c", "write -P 0x5a 1M 64k"])
    shell.run(["qemu-img", "convert", "--image-opts", opened, "-O", "raw", str(out)])
    data = out.read_bytes()
    assert len(data) == 3 << 20
    assert data[:5] == b"below"
    assert data[1 << 20 : (1 << 20) + (64 << 10)] == b"\x5a" * (64 << 10)
    assert base.read_bytes() == b"below" + bytes((3 << 20) - 5)
    shell.run(["qemu-img", "check", str(image)])
