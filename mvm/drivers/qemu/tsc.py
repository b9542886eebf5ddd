"""The rate of the host's time stamp counter."""

from __future__ import annotations

import ctypes
import mmap
import platform
import threading
import time
from functools import cache

from mvm.errors import Failed

_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx, 32; or rax, rdx; ret
_MEASURE_S = 0.05


@cache
def host_tsc_khz() -> int:
    """The rate in kHz, measured once in a process, against the kernel's raw monotonic clock.

    /proc/cpuinfo shows the core's present frequency, which need not be the counter's.
    """
    if platform.machine() != "x86_64":
        raise Failed("vmm.start_failed", "this driver needs an x86_64 host", machine=platform.machine())
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_RDTSC)
    code = ctypes.c_char.from_buffer(page)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(code))

    def sample() -> tuple[int, int]:
        """Counter and nanoseconds, taken as close together as five tries allow."""
        tries = []
        for _ in range(5):
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            ticks = read()
            after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            tries.append((after - before, ticks, (before + after) // 2))
        _, ticks, nanoseconds = min(tries)
        return ticks, nanoseconds

    ticks, nanoseconds = sample()
    threading.Event().wait(_MEASURE_S)  # a rate needs an interval: nothing else can be observed
    later_ticks, later_nanoseconds = sample()
    return round((later_ticks - ticks) * 1_000_000 / (later_nanoseconds - nanoseconds))
