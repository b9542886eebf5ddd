"""What a VMM says of itself, how a guest's run ended, and what follows from either. Pure."""

from __future__ import annotations

from enum import StrEnum


class VmmState(StrEnum):
    """What a VMM that is there says of itself."""

    RUNNING = "running"
    PAUSED = "paused"
    IO_ERROR = "io-error"
    """It paused the guest, whose write found no room on the host's disk; the write is tried again when it goes on."""
    PANICKED = "guest-panicked"
    BROKEN = "internal-error"
    """The accelerator cannot go on with the guest."""
    WATCHDOG = "watchdog"
    ENDED = "shutdown"
    """The guest has ended, and the VMM was told to stay."""
    BETWEEN = "between"
    """It is being started, saved or restored."""
    UNKNOWN = "unknown"

    @property
    def stands_still(self) -> bool:
        """Whether its guest does not run, and would if it were let go on."""
        return self in (VmmState.PAUSED, VmmState.IO_ERROR)

    @property
    def over(self) -> bool:
        """Whether its guest will never run again."""
        return self in _ENDINGS


class Ending(StrEnum):
    """How a run of an instance ended that nobody here ended."""

    HALTED = "halted"
    REBOOTED = "rebooted"
    PANICKED = "panicked"
    TERMINATED = "terminated"
    """Somebody on the host told the VMM to end."""
    CRASHED = "crashed"
    """The VMM is gone and has not said why: it was killed, or failed."""

    @property
    def by_guest(self) -> bool:
        """Whether the guest wanted it so."""
        return self in (Ending.HALTED, Ending.REBOOTED)


class OnExit(StrEnum):
    """What becomes of an instance whose guest has halted or rebooted by itself.

    RESTART: one that rebooted starts again, one that halted does where its pool's count asks for it. STOP: it rests,
    keeps its place in the count, and is started by persons only. Guests that panic, and VMMs that crash, are replaced
    in either case where the count asks for it.
    """

    RESTART = "restart"
    STOP = "stop"


_ENDINGS = {
    VmmState.PANICKED: Ending.PANICKED,
    VmmState.BROKEN: Ending.CRASHED,
    VmmState.WATCHDOG: Ending.CRASHED,
    VmmState.ENDED: Ending.HALTED,
}
_SHUTDOWNS = {
    "guest-shutdown": Ending.HALTED,
    "guest-reset": Ending.REBOOTED,
    "guest-panic": Ending.PANICKED,
    "host-signal": Ending.TERMINATED,
    "host-qmp-quit": Ending.TERMINATED,
    "host-qmp-system-reset": Ending.TERMINATED,
    "host-ui": Ending.TERMINATED,
}
_HALTED = "reboot: System halted"  # the kernel's, which then keeps the machine on and does nothing any more
_LAST_WORDS = {"reboot: Power down": Ending.HALTED, "reboot: Restarting system": Ending.REBOOTED}
PANIC = "Kernel panic - not syncing"
_TOLD = {
    Ending.HALTED: ("its guest powered off by itself", "guest.halted"),
    Ending.REBOOTED: ("its guest rebooted", "guest.rebooted"),
    Ending.PANICKED: ("its guest panicked", "guest.panicked"),
    Ending.TERMINATED: ("somebody on the host told VMM process {pid} to end", "vmm.terminated"),
    Ending.CRASHED: ("VMM process {pid} was found gone", "vmm.gone"),
}
_MIN_ROOM = 16 << 20
"""Bytes that must be free before a guest that ran out of room goes on: what it holds back is tried again at once."""


def ending_of(state: VmmState) -> Ending:
    """How the run of a VMM ended that is there, but `over`."""
    return _ENDINGS[state]


def halted(console: str) -> bool:
    """Whether a guest that does not answer has halted without powering its machine off: its VMM says that it runs."""
    return console.rstrip().endswith(_HALTED)


def ending(reason: str | None, console: str, *, told: bool) -> Ending:
    """How a run ended whose VMM is gone.

    `reason` is what the VMM gave for its shutdown, if it did; VMMs of older versions were not `told` to write that
    down, and then the end of the guest's `console` has to do. A panic ends in a reset, which the console tells from
    a reboot: what a guest writes there is its own word, but about nobody else.
    """
    if reason is None and not told:
        last = console.rstrip().rpartition("\n")[2]
        return next((how for words, how in _LAST_WORDS.items() if last.endswith(words)), _panic_or(console))
    how = _SHUTDOWNS.get(reason or "", Ending.CRASHED)
    return _panic_or(console, how) if how is Ending.REBOOTED or reason is None else how


def _panic_or(console: str, how: Ending = Ending.CRASHED) -> Ending:
    return Ending.PANICKED if PANIC in console else how


def told(how: Ending, pid: int | None) -> tuple[str, str]:
    """What people are told of an ending, and its code."""
    words, code = _TOLD[how]
    return words.format(pid=pid or "?"), code


def why_still(state: VmmState) -> tuple[str, str]:
    """What people are told of a guest that stands still though it should run, and its code."""
    if state is VmmState.IO_ERROR:
        return "the host's disk is full, so its VMM has paused it", "vmm.io_error"
    return "its VMM has paused it, and nobody here asked for that", "vmm.paused"


def has_room(free: int) -> bool:
    """Whether a guest that stands still for want of room may go on, with so many bytes free."""
    return free >= _MIN_ROOM
