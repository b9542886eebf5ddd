"""The filter that a VMM inherits, interpreted here as the kernel does it."""

from __future__ import annotations

import struct

import pytest

from mvm.domain.pool import SeccompPolicy
from mvm.drivers.qemu import seccomp

X86_64, I386 = 0xC000003E, 0x40000003
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
NAME = 0x400078
READ, SOCKET, CLONE, FORK, EXECVE, CHOWN, PTRACE, MKDIR, IO_URING, CLONE3, NEWER, IOCTL = (
    0, 41, 56, 57, 59, 92, 101, 83, 425, 435, 460, 16,
)  # fmt: skip


def decide(policy: SeccompPolicy, number: int, first: int = 0, arch: int = X86_64, second: int = 0) -> int:
    data = struct.pack("<IIQ6Q", number, arch, 0, first, second, 0, 0, 0, 0)
    rules = list(struct.iter_unpack("<HBBI", seccomp.inherited(policy, NAME)))
    accumulator = at = 0
    while True:
        code, yes, no, value = rules[at]
        at += 1
        if code == 0x06:
            return int(value)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
            continue
        holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
        at += yes if holds else no


@pytest.mark.parametrize("policy", SeccompPolicy)
def test_what_both_policies_say(policy: SeccompPolicy) -> None:
    assert decide(policy, READ) == ALLOW
    assert decide(policy, READ, arch=I386) == KILL
    assert decide(policy, READ | 0x40000000) == KILL
    assert {decide(policy, number) for number in (SOCKET, FORK, PTRACE, IO_URING)} == {EPERM}
    assert decide(policy, CLONE3) == ENOSYS
    assert decide(policy, CLONE, first=0x00010F00) == ALLOW  # a thread
    assert decide(policy, CLONE, first=17) == EPERM  # a process


@pytest.mark.parametrize("policy", SeccompPolicy)
def test_only_the_launchers_own_name_may_be_started(policy: SeccompPolicy) -> None:
    assert decide(policy, EXECVE, first=NAME) == ALLOW
    for other in (NAME + 1, 0, NAME | 1 << 32, 0x7FFF_FFFF_E000):
        assert decide(policy, EXECVE, first=other) == EPERM


@pytest.mark.parametrize("policy", SeccompPolicy)
def test_a_tap_stays_as_it_is(policy: SeccompPolicy) -> None:
    for request in (0x8924, 0x400454CA, 0x400454CB, 0x400454D9, 0x54E3, 0x8924 | 1 << 32):
        assert decide(policy, IOCTL, second=request) == EPERM
        assert decide(policy, READ, second=request) == ALLOW
    for request in (0x800454D2, 0x400454D0, 0x400454D4, 0x400454D8, 0xAE80):  # what QEMU asks of a TAP; KVM_RUN
        assert decide(policy, IOCTL, second=request) == ALLOW


def test_strict_denies_whatever_the_devices_do_not_need() -> None:
    for number in (MKDIR, CHOWN):
        assert decide(SeccompPolicy.BASELINE, number) == ALLOW
        assert decide(SeccompPolicy.STRICT, number) == EPERM
    assert decide(SeccompPolicy.STRICT, NEWER) == ENOSYS


def test_it_is_as_long_as_the_kernel_takes() -> None:
    for policy in SeccompPolicy:
        assert 0 < len(seccomp.inherited(policy, NAME)) // 8 < 4096
