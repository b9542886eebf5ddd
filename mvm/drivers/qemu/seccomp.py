"""Filters of system calls that a VMM inherits, as classic BPF: pure functions. For x86-64."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from mvm.domain.pool import SeccompPolicy

QEMUS_OWN = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

_ARCH = 0xC000003E  # x86-64
_X32 = 0x40000000
_NUMBER, _ARCHITECTURE, _FIRST_LOW, _FIRST_HIGH, _SECOND_LOW = 0, 4, 16, 20, 24  # offsets in struct seccomp_data
_LOAD, _EQUAL, _AT_LEAST, _HAS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38

_EXECVE, _CLONE, _CLONE3, _IOCTL = 59, 56, 435, 16
_NEW = 436  # from here on: newer than QEMU 7.2, whose C library copes without
_THREAD = 0x00010000  # CLONE_THREAD

# Nothing a VMM does needs these, whatever its devices: other processes, mounts, namespaces, keys, the kernel's
# insides, sockets besides those that it was given.
_NEVER = {
    "socket": 41, "socketpair": 53, "connect": 42, "bind": 49, "ptrace": 101, "process_vm_readv": 310,
    "process_vm_writev": 311, "kcmp": 312, "pidfd_open": 434, "pidfd_getfd": 438, "process_madvise": 440,
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "move_mount": 429, "open_tree": 428,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "unshare": 272, "setns": 308,
    "keyctl": 250, "add_key": 248, "request_key": 249, "bpf": 321, "userfaultfd": 323, "perf_event_open": 298,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "execveat": 322, "init_module": 175,
    "finit_module": 313, "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320, "reboot": 169,
    "swapon": 167, "swapoff": 168, "open_by_handle_at": 304, "name_to_handle_at": 303, "acct": 163, "quotactl": 179,
    "settimeofday": 164, "clock_settime": 227, "adjtimex": 159, "clock_adjtime": 305, "sethostname": 170,
    "setdomainname": 171, "iopl": 172, "ioperm": 173, "modify_ldt": 154, "syslog": 103, "fanotify_init": 300,
    "mknod": 133, "mknodat": 259, "personality": 135, "vhangup": 153, "lookup_dcookie": 212, "uselib": 134,
    "ustat": 136, "sysfs": 139, "vmsplice": 278, "fork": 57, "vfork": 58,
}  # fmt: skip

# The kernel lets whoever has a TAP open change it. With another guest's MAC it would take that guest's place.
_NEVER_OF_A_TAP = {
    "SIOCSIFHWADDR": 0x8924, "TUNSETIFF": 0x400454CA, "TUNSETPERSIST": 0x400454CB, "TUNSETOWNER": 0x400454CC,
    "TUNSETLINK": 0x400454CD, "TUNSETGROUP": 0x400454CE, "TUNSETTXFILTER": 0x400454D1, "TUNATTACHFILTER": 0x401054D5,
    "TUNSETQUEUE": 0x400454D9, "TUNSETCARRIER": 0x400454E2, "TUNGETDEVNETNS": 0x54E3,
}  # fmt: skip

# What QEMU does with the devices that a microVM has, once its program is loaded: seen, and what their libraries may
# do instead. No socket is made, named or connected (those given to it listen); nothing is created, removed or renamed.
_ALWAYS = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23,
    "sched_yield": 24, "mremap": 25, "msync": 26, "mincore": 27, "madvise": 28, "dup": 32, "dup2": 33,
    "nanosleep": 35, "getitimer": 36, "setitimer": 38, "getpid": 39, "accept": 43, "sendto": 44, "recvfrom": 45,
    "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "listen": 50, "getsockname": 51, "getpeername": 52,
    "setsockopt": 54, "getsockopt": 55, "exit": 60, "uname": 63, "fcntl": 72, "fsync": 74, "fdatasync": 75,
    "ftruncate": 77, "getdents": 78, "getcwd": 79, "readlink": 89, "umask": 95, "gettimeofday": 96, "getrlimit": 97,
    "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
    "getppid": 110, "getgroups": 115, "getresuid": 118, "getresgid": 120, "capget": 125, "rt_sigpending": 127,
    "rt_sigtimedwait": 128, "sigaltstack": 131, "statfs": 137, "fstatfs": 138, "sched_getparam": 143,
    "sched_getscheduler": 145, "prctl": 157, "arch_prctl": 158, "gettid": 186, "tkill": 200, "time": 201,
    "futex": 202, "sched_setaffinity": 203, "sched_getaffinity": 204, "io_setup": 206, "io_destroy": 207,
    "io_getevents": 208, "io_submit": 209, "io_cancel": 210, "epoll_create": 213, "getdents64": 217,
    "set_tid_address": 218, "fadvise64": 221, "timer_create": 222, "timer_settime": 223, "timer_gettime": 224,
    "timer_getoverrun": 225, "timer_delete": 226, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "tgkill": 234, "openat": 257, "newfstatat": 262,
    "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273,
    "get_robust_list": 274, "sync_file_range": 277, "epoll_pwait": 281, "signalfd": 282, "timerfd_create": 283,
    "eventfd": 284, "fallocate": 285, "timerfd_settime": 286, "timerfd_gettime": 287, "accept4": 288,
    "signalfd4": 289, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293, "preadv": 295, "pwritev": 296,
    "prlimit64": 302, "getcpu": 309, "seccomp": 317, "getrandom": 318, "memfd_create": 319, "membarrier": 324,
    "copy_file_range": 326, "preadv2": 327, "pwritev2": 328, "statx": 332, "rseq": 334, "ioctl": 16,
}  # fmt: skip


def inherited(policy: SeccompPolicy, program: int) -> bytes:
    """The filter for a VMM; of `execve` it lets through what names its file at the address `program`.

    That address is the launcher's. QEMU puts a filter of its own on top, which denies `execve` altogether.
    """
    rules = [
        *_load(_ARCHITECTURE), *_unless(_ARCH, _KILL), *_load(_NUMBER), _jump(_AT_LEAST, _X32, 0, 1), _return(_KILL),
        *_if(_CLONE3, _ERRNO | _ENOSYS),  # the C library then uses clone, whose flags can be seen
        _jump(_EQUAL, _CLONE, 0, 4), *_load(_FIRST_LOW), _jump(_HAS, _THREAD, 0, 1), _return(_ALLOW),
        _return(_ERRNO | _EPERM),
        _jump(_EQUAL, _EXECVE, 0, 6), *_load(_FIRST_LOW), _jump(_EQUAL, program, 0, 3), *_load(_FIRST_HIGH),
        _jump(_EQUAL, 0, 0, 1), _return(_ALLOW), _return(_ERRNO | _EPERM),
    ]  # fmt: skip
    rules += [*_numbers(_NEVER.values(), _ERRNO | _EPERM)]
    asked = [*_load(_SECOND_LOW), *_numbers(_NEVER_OF_A_TAP.values(), _ERRNO | _EPERM), *_load(_NUMBER)]
    rules += [_jump(_EQUAL, _IOCTL, 0, len(asked)), *asked]
    if policy is SeccompPolicy.STRICT:
        rules += [*_numbers(_ALWAYS.values(), _ALLOW)]
        rules += [_jump(_AT_LEAST, _NEW, 0, 1), _return(_ERRNO | _ENOSYS), _return(_ERRNO | _EPERM)]
    else:
        rules += [_return(_ALLOW)]
    return b"".join(rules)


def _numbers(numbers: Iterable[int], action: int) -> Iterable[bytes]:
    for number in numbers:
        yield from _if(number, action)


def _if(value: int, action: int) -> tuple[bytes, ...]:
    return _jump(_EQUAL, value, 0, 1), _return(action)


def _unless(value: int, action: int) -> tuple[bytes, ...]:
    return _jump(_EQUAL, value, 1, 0), _return(action)


def _load(offset: int) -> tuple[bytes, ...]:
    return (_instruction(_LOAD, 0, 0, offset),)


def _jump(kind: int, value: int, yes: int, no: int) -> bytes:
    return _instruction(kind, yes, no, value)


def _return(action: int) -> bytes:
    return _instruction(_RETURN, 0, 0, action)


def _instruction(code: int, yes: int, no: int, value: int) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value)
