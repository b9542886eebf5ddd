"""Choosing the accelerator, and the host's clock rate."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mvm.drivers.qemu import accel
from mvm.drivers.qemu.accel import Accelerator, AcceleratorProbe
from mvm.drivers.qemu.tsc import host_tsc_khz
from mvm.drivers.shell import LocalShell
from mvm.errors import Failed, TimedOut
from mvm.ports.shell import Completed
from tests.support.microvm import minimal_image

FILES = (Path("/kernel"), Path("/initramfs"))
BOOTED = Completed("noise\r\nmvm: probe\r\n", "")


class Scripted(LocalShell):
    """A shell whose every run ends as told."""

    def __init__(self, outcome: Completed | Exception) -> None:
        super().__init__()
        self.outcome = outcome
        self.runs: list[list[str]] = []

    def run(self, argv, **options):  # type: ignore[no-untyped-def]
        self.runs.append(list(argv))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def probe(tmp_path: Path, shell: LocalShell, kvm: Path = Path("/dev/null")) -> AcceleratorProbe:
    return AcceleratorProbe(shell, tmp_path / "run" / "accelerator.json", kvm=kvm)


def test_kvm_when_a_guest_booted_on_it(tmp_path: Path) -> None:
    shell = Scripted(BOOTED)
    assert probe(tmp_path, shell).choose(lambda: FILES) == Accelerator("kvm", "a guest booted on it")
    (words,) = shell.runs
    assert words[words.index("-accel") + 1] == "kvm"


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (Completed("Linux version 6", ""), "ended before it had booted"),
        (TimedOut("shell.timed_out", "qemu did not end within 8 s"), "did not end within 8 s"),
        (Failed("shell.failed", "qemu failed", stderr="qemu: failed to set MSR\nmore"), "qemu: failed to set MSR"),
    ],
)
def test_tcg_with_the_reason_when_it_did_not(tmp_path: Path, outcome: Completed | Exception, reason: str) -> None:
    chosen = probe(tmp_path, Scripted(outcome)).choose(lambda: FILES)
    assert chosen.name == "tcg"
    assert chosen.reason.endswith(reason)


def test_without_the_device_nothing_is_tried(tmp_path: Path) -> None:
    shell = Scripted(BOOTED)
    chosen = probe(tmp_path, shell, tmp_path / "kvm").choose(lambda: FILES)
    assert chosen == Accelerator("tcg", f"{tmp_path}/kvm: No such file or directory")
    assert not shell.runs


def test_without_an_image_the_answer_is_not_kept(tmp_path: Path) -> None:
    one = probe(tmp_path, Scripted(BOOTED))
    assert one.choose(lambda: None).name == "tcg"
    assert one.choose(lambda: FILES).name == "kvm"


def test_it_is_tried_once_until_the_host_boots_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Scripted(BOOTED)
    one = probe(tmp_path, shell)
    assert one.choose(lambda: FILES) == one.choose(lambda: FILES) == probe(tmp_path, shell).choose(lambda: FILES)
    assert len(shell.runs) == 1
    other = tmp_path / "boot_id"
    other.write_text("another boot\n")
    monkeypatch.setattr(accel, "_BOOT_ID", other)
    probe(tmp_path, shell).choose(lambda: FILES)
    assert len(shell.runs) == 2


@pytest.mark.parametrize("kept", ["", "{", "[]", '{"name": "kvm"}', '{"boot_id": "%s", "name": "kvm"}'])
def test_a_damaged_note_is_found_out_again(tmp_path: Path, kept: str) -> None:
    (tmp_path / "run").mkdir()
    boot = accel._BOOT_ID.read_text().strip()
    (tmp_path / "run" / "accelerator.json").write_text(kept.replace("%s", boot))
    shell = Scripted(BOOTED)
    probe(tmp_path, shell).choose(lambda: FILES)
    assert len(shell.runs) == 1


@pytest.mark.guest
def test_the_probe_guest_says_its_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown on TCG, which every host has: what decides about KVM is the same guest."""

    def on_tcg(accelerator: str, base: Callable[[str], list[str]] = accel.argv.base) -> list[str]:
        return base("tcg")

    monkeypatch.setattr(accel.argv, "base", on_tcg)
    monkeypatch.setattr(accel, "_DEADLINE_S", 120)
    image = minimal_image()
    chosen = probe(tmp_path, LocalShell()).choose(lambda: (image / "vmlinux", image / "initramfs.cpio"))
    assert chosen == Accelerator("kvm", "a guest booted on it")


def test_the_measured_rate_is_stable_and_near_what_the_kernel_shows() -> None:
    first = host_tsc_khz()
    host_tsc_khz.cache_clear()
    assert abs(host_tsc_khz() - first) / first < 0.001
    shown = re.search(r"cpu MHz\s*: ([0-9.]+)", Path("/proc/cpuinfo").read_text())
    assert shown
    assert 0.2 < float(shown[1]) * 1000 / first < 3  # the core's present frequency, which need not be the counter's
