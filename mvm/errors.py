"""Every error mvm raises on purpose.

::

    MvmError
    ├── InvalidInput      exit 2   the caller's words are off; nothing was changed
    ├── NotFound          exit 3
    ├── NotAllowed        exit 4   not in this state, or it already exists
    ├── QuotaExceeded     exit 5   quota or capacity
    ├── Unreachable       exit 6   retryable: Redis, an agent or a guest did not answer
    │   └── GuestGone     exit 6   a guest's VMM does not run
    ├── TimedOut          exit 6   retryable
    │   ├── GuestSilent   exit 6   a guest said nothing that was an answer
    │   └── Overdue       exit 6   a job's own deadline; another try would take as long
    ├── Forbidden         exit 7
    └── Failed            exit 1   the operation was tried and did not succeed
        ├── GuestRefused  exit 1   a guest answered, and not as it should
        ├── Cancelled     exit 1
        └── Fenced        exit 1   somebody else has taken over what this job worked on

The three of guests are `GuestFault` as well: a guest's word, or want of one, which never decides whether the host may
act.

A class says what *kind* of failure it is (exit code, whether trying again can help); `code` is the
stable name of the failure, such as ``instance.not_found``. Foreign exceptions are translated at the edge
of the driver that meets them and never cross a port.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class MvmError(Exception):
    """Base of the tree. `fields` are JSON values that name the offending input or subject."""

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False
    kind: ClassVar[str] = "error"

    def __init__(self, code: str, message: str, *, hint: str = "", **fields: object) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.hint = hint
        self.fields: dict[str, object] = fields

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"

    def to_dict(self) -> dict[str, object]:
        """JSON form: ``kind, code, message, hint, fields``."""
        return {
            "kind": self.kind,
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "fields": self.fields,
        }


class InvalidInput(MvmError):
    """A value that can never be accepted; `fields["field"]` names it where there is one."""

    exit_code = 2
    kind = "invalid"


class NotFound(MvmError):
    """The subject does not exist."""

    exit_code = 3
    kind = "not_found"


class NotAllowed(MvmError):
    """The subject's state forbids it, or it already exists."""

    exit_code = 4
    kind = "not_allowed"


class QuotaExceeded(MvmError):
    """A quota or the host's capacity would be exceeded; nothing was created."""

    exit_code = 5
    kind = "quota"


class Unreachable(MvmError):
    """A part that should answer does not."""

    exit_code = 6
    retryable = True
    kind = "unreachable"


class TimedOut(MvmError):
    """A deadline passed while waiting for an observed condition."""

    exit_code = 6
    retryable = True
    kind = "timed_out"


class Overdue(TimedOut):
    """A job took longer than its deadline allows; what it had begun is undone."""

    retryable = False
    kind = "overdue"


class Forbidden(MvmError):
    """The caller lacks the permission."""

    exit_code = 7
    kind = "forbidden"


class Failed(MvmError):
    """The operation was tried and failed."""

    kind = "failed"


class Cancelled(Failed):
    """Somebody asked for the job to be cancelled and what it had begun is undone."""

    kind = "cancelled"


class Fenced(Failed):
    """Another worker has taken over: whoever meets this acts no more, and undoes nothing."""

    kind = "fenced"


class GuestFault(MvmError):
    """Something went wrong on the guest's side of its channel. Guests say what they like; see `mvm.ports.guest`."""


class GuestGone(GuestFault, Unreachable):
    """There is no VMM, so no guest."""


class GuestSilent(GuestFault, TimedOut):
    """No answer came within the deadline, whatever else may have come."""


class GuestRefused(GuestFault, Failed):
    """The guest said no, or something that is no answer at all."""


_KINDS: dict[str, type[MvmError]] = {
    cls.kind: cls
    for cls in (
        MvmError, InvalidInput, NotFound, NotAllowed, QuotaExceeded, Unreachable, TimedOut, Overdue, Forbidden,
        Failed, Cancelled, Fenced,
    )
}  # fmt: skip


def error_from_dict(data: Mapping[str, object]) -> MvmError:
    """The error that `MvmError.to_dict` described, as the same class; unknown kinds become `MvmError`."""
    fields = data.get("fields")
    cls = _KINDS.get(str(data.get("kind")), MvmError)
    error = cls(str(data.get("code", "internal")), str(data.get("message", "")), hint=str(data.get("hint", "")))
    error.fields = dict(fields) if isinstance(fields, Mapping) else {}
    return error
