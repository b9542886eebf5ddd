"""The guest's program ``runner``: runs commands for the host, one at a time, and tells what comes of them.

It serves a virtio-serial port, open as descriptor 0 (the words are in `mvm.guest`). What a command writes goes through
its pipes to the host and is kept nowhere: no file system that a workload may fill is on the way, and a host that does
not listen holds the command up. It replies when the command's first process has ended, with what was written until
then; what that one left behind is let be. When the host hangs up or asks for something else, the command is killed with
all that it began: they are in a control group of their own or, where the guest has none, in one process group.
"""

from __future__ import annotations

import struct

from mvm import guest
from mvm.drivers.builtin.assembler import Assembler, Value, When

_READ, _WRITE, _OPEN, _CLOSE, _POLL, _IOCTL = 0, 1, 2, 3, 7, 16
_DUP2, _EXECVE, _EXIT, _WAIT4, _KILL, _FCNTL = 33, 59, 60, 61, 62, 72
_CHDIR, _MKDIR, _RMDIR, _UMASK, _SETSID, _OPENAT, _PIPE2, _CLONE3 = 80, 83, 84, 95, 112, 257, 293, 435

_O_RDONLY, _O_WRONLY, _O_RDWR, _O_NONBLOCK, _O_DIRECTORY, _O_CLOEXEC = 0, 1, 2, 0o4000, 0o200000, 0o2000000
_F_SETFL, _FIONREAD = 4, 0x541B
_POLLIN, _POLLOUT, _POLLERR, _POLLHUP = 1, 4, 8, 16
_CLONE_PIDFD, _CLONE_INTO_CGROUP = 0x1000, 0x2_0000_0000
_SIGKILL, _SIGCHLD = 9, 17
_EAGAIN, _EBUSY = 11, 16
_FOREVER = -1
_NO_PROGRAM = 127

_PORT, _STDIN, _STDOUT, _STDERR = 0, 0, 1, 2
_GROUPS = b"/sys/fs/cgroup/"
_REQUEST_BYTES = 256 * 1024
_PIECE = guest.FRAME_LIMIT - guest.FRAME.size
_TRIES, _PAUSE_MS = 200, 5  # for what was killed to be gone
_OCCUPIED = 16  # groups that are remembered because somebody left behind lives in them
_VERB = b" run "
_POLLED = struct.Struct("<ihh")
_FOUND = 6  # where in it the kernel says what there is
_CLONE = struct.Struct("<11Q")


class _Memory:
    """Where the program keeps what it needs."""

    def __init__(self, code: Assembler, groups: bytes) -> None:
        self.shell = code.constant(b"/bin/sh\0")
        self.home = code.constant(b"/root\0")
        self.null = code.constant(b"/dev/null\0")
        self.newline = code.constant(b"\n")
        self.kill_file = code.constant(b"cgroup.kill\0")
        self.one = code.constant(b"1")
        self.names = code.constant(b"sh\0-c\0")
        self.group = code.constant(groups + b"mvm-12345678\0")
        self.group_token = self.group + len(groups) + len(b"mvm-")

        self.process = code.constant(bytes(8))  # a descriptor of the command's first process
        self.grouped = code.constant(self._clone(_CLONE_PIDFD | _CLONE_INTO_CGROUP))
        self.grouped_fd = self.grouped + _CLONE.size - 8
        self.plain = code.constant(self._clone(_CLONE_PIDFD))
        self.port_polled = code.constant(_POLLED.pack(_PORT, _POLLIN | _POLLOUT, 0))
        self.polled = code.constant(_POLLED.pack(_PORT, _POLLIN, 0) + _POLLED.pack(-1, _POLLIN, 0) * 3)
        self.out_polled, self.err_polled, self.end_polled = (self.polled + _POLLED.size * n for n in (1, 2, 3))
        self.before = code.constant(bytes(7) + b"\n")  # ends the look back for a line's beginning

        self.request = code.variable(_REQUEST_BYTES)
        self.length, self.where, self.room = code.variable(), code.variable(), code.variable()
        self.stack, self.environment = code.variable(), code.variable()
        self.arguments = code.variable(4 * 8)
        self.pair = code.variable()
        self.out, self.out_inside = code.variable(), code.variable()
        self.err, self.err_inside = code.variable(), code.variable()
        self.group_fd, self.pid, self.status, self.left, self.scratch = (code.variable() for _ in range(5))
        self.occupied, self.last_occupied = code.variable(_OCCUPIED * 8), code.variable()
        self.frame = code.variable(guest.FRAME_LIMIT)
        self.kind = self.frame + guest.TOKEN_BYTES
        self.size = self.kind + 1
        self.payload = self.frame + guest.FRAME.size
        self.total = code.variable()
        assert self.request == self.before + 8

    def _clone(self, flags: int) -> bytes:
        return _CLONE.pack(flags, self.process, 0, 0, _SIGCHLD, 0, 0, 0, 0, 0, 0)


def program(groups: bytes = _GROUPS) -> bytes:
    """It, as a static x86-64 executable; `groups` is where the kernel shows control groups."""
    code = Assembler()
    memory = _Memory(code, groups)
    _begin(code, memory)
    _await_request(code, memory)
    _read_request(code, memory)
    _start_command(code, memory)
    _be_command(code, memory)
    _follow_command(code, memory)
    _abandon(code, memory)
    _stream(code, memory, "out", memory.out, memory.out_polled, guest.STDOUT)
    _stream(code, memory, "err", memory.err, memory.err_polled, guest.STDERR)
    _send(code, memory)
    _forget(code, memory)
    return code.executable()


def _begin(code: Assembler, memory: _Memory) -> None:
    code.emit("48892425", memory.stack)  # mov [stack], rsp
    code.emit("488d442418")  # lea rax, [rsp + 24]: behind the count, one argument and its end
    code.store(memory.environment)
    code.put(memory.arguments, memory.names)
    code.put(memory.arguments + 8, memory.names + len(b"sh\0"))
    code.put(memory.arguments + 16, memory.request)


def _await_request(code: Assembler, memory: _Memory) -> None:
    """Read until there is a line's end."""
    code.label("idle")
    code.emit("488b2425", memory.stack)  # mov rsp, [stack]
    code.system_call(_FCNTL, _PORT, _F_SETFL, _O_RDWR)
    code.label("anew")
    code.put(memory.length, 0)
    code.label("more")
    code.load(memory.length)
    code.add(memory.request)
    code.store(memory.where)
    code.load(memory.length)
    code.negate()
    code.add(_REQUEST_BYTES)
    code.store(memory.room)
    code.system_call(_READ, _PORT, Value(memory.where), Value(memory.room))
    code.compare(0)
    code.jump("came", When.GREATER)
    code.jump("die", When.LESS)
    code.system_call(_WRITE, _PORT, memory.newline, 1)  # no client: it waits for the next one
    code.jump("anew")
    code.label("die")
    code.system_call(_EXIT, 1)


def _read_request(code: Assembler, memory: _Memory) -> None:
    """Of several lines the last counts: who sent the others has gone. The command takes the request's place."""
    code.label("came")
    code.add_from(memory.length)
    code.store(memory.length)
    code.compare(_REQUEST_BYTES)
    code.jump("anew", When.EQUAL)
    code.emit("8db0", memory.request - 1)  # lea esi, [rax + request - 1]: the last byte
    code.emit("803e0a")  # cmp byte [rsi], 10
    code.jump("more", When.NOT_EQUAL)
    code.emit("4889f3")  # mov rbx, rsi
    code.label("back")
    code.emit("48ffcb")  # dec rbx
    code.emit("803b0a")  # cmp byte [rbx], 10
    code.jump("back", When.NOT_EQUAL)
    code.emit("48ffc3")  # inc rbx: where the line begins
    code.emit("4889f04829d8")  # mov rax, rsi; sub rax, rbx
    code.compare(guest.TOKEN_BYTES + len(_VERB) + len(b" ."))
    code.jump("anew", When.LESS)
    code.emit("817b08", int.from_bytes(_VERB[:4], "little"))  # cmp dword [rbx + 8], " run"
    code.jump("anew", When.NOT_EQUAL)
    code.emit("66817efe202e")  # cmp word [rsi - 2], " ."
    code.jump("anew", When.NOT_EQUAL)

    code.emit("488b03")  # mov rax, [rbx]
    code.store(memory.frame)
    code.store(memory.group_token)
    code.emit("4883c30d4883ee02")  # add rbx, 13; sub rsi, 2: the letters, in pairs
    code.emit("bf", memory.request)  # mov edi, request
    code.label("letters")
    code.emit("4839f3")  # cmp rbx, rsi
    code.jump("command", When.NOT_BELOW)
    code.emit("8a032c61c0e004")  # mov al, [rbx]; sub al, 'a'; shl al, 4
    code.emit("0243012c61")  # add al, [rbx + 1]; sub al, 'a'
    code.emit("880748ffc74883c302")  # mov [rdi], al; inc rdi; add rbx, 2
    code.jump("letters")
    code.label("command")
    code.emit("c60700")  # mov byte [rdi], 0


def _start_command(code: Assembler, memory: _Memory) -> None:
    code.system_call(_FCNTL, _PORT, _F_SETFL, _O_RDWR | _O_NONBLOCK)
    for outside, inside in ((memory.out, memory.out_inside), (memory.err, memory.err_inside)):
        code.system_call(_PIPE2, memory.pair, _O_CLOEXEC)
        code.compare(0)
        code.jump("failed", When.LESS)
        code.emit("8b0425", memory.pair)  # mov eax, [pair]
        code.store(outside)
        code.emit("8b0425", memory.pair + 4)
        code.store(inside)

    code.system_call(_MKDIR, memory.group, 0o700)
    code.system_call(_OPEN, memory.group, _O_DIRECTORY | _O_CLOEXEC)
    code.store(memory.group_fd)
    code.compare(0)
    code.jump("alone", When.LESS)
    code.store(memory.grouped_fd)
    code.system_call(_CLONE3, memory.grouped, _CLONE.size)
    code.compare(0)
    code.jump("child", When.EQUAL)
    code.jump("parent", When.GREATER)
    code.label("alone")
    code.system_call(_CLONE3, memory.plain, _CLONE.size)
    code.compare(0)
    code.jump("child", When.EQUAL)
    code.jump("parent", When.GREATER)

    code.label("failed")  # what is open ends with this program, and init starts another
    code.negate()
    code.store_int(memory.payload)
    code.put_byte(memory.kind, guest.FAILED)
    code.set(4)
    code.call("send")
    code.jump("die")


def _be_command(code: Assembler, memory: _Memory) -> None:
    code.label("child")
    code.system_call(_SETSID)
    code.system_call(_DUP2, Value(memory.out_inside), _STDOUT)
    code.system_call(_DUP2, Value(memory.err_inside), _STDERR)
    code.system_call(_OPEN, memory.null, _O_RDONLY | _O_CLOEXEC)
    code.store(memory.scratch)
    code.system_call(_DUP2, Value(memory.scratch), _STDIN)
    code.system_call(_CHDIR, memory.home)
    code.system_call(_UMASK, 0o022)
    code.system_call(_EXECVE, memory.shell, memory.arguments, Value(memory.environment))
    code.system_call(_EXIT, _NO_PROGRAM)


def _follow_command(code: Assembler, memory: _Memory) -> None:
    code.label("parent")
    code.store(memory.pid)
    code.system_call(_CLOSE, Value(memory.out_inside))
    code.system_call(_CLOSE, Value(memory.err_inside))
    for descriptor, polled in (
        (memory.out, memory.out_polled), (memory.err, memory.err_polled), (memory.process, memory.end_polled)
    ):  # fmt: skip
        code.load(descriptor)
        code.store_int(polled)
    code.put_byte(memory.kind, guest.BEGUN)
    code.set(0)
    code.call("send")

    code.label("follow")
    code.system_call(_POLL, memory.polled, 4, _FOREVER)
    code.compare(0)
    code.jump("follow", When.LESS_OR_EQUAL)
    code.load_short(memory.polled + _FOUND)
    code.compare(0)
    code.jump("gone", When.NOT_EQUAL)
    code.call("pass on out")
    code.call("pass on err")
    code.load_short(memory.end_polled + _FOUND)
    code.compare(0)
    code.jump("follow", When.EQUAL)

    code.call("rest of out")
    code.call("rest of err")
    code.system_call(_WAIT4, Value(memory.pid), memory.status, 0, 0)
    code.load(memory.status)
    code.store_int(memory.payload)
    code.put_byte(memory.kind, guest.ENDED)
    code.set(4)
    code.call("send")
    code.call("forget")
    code.jump("idle")


def _abandon(code: Assembler, memory: _Memory) -> None:
    """Nobody listens any more: the command ends, and it has ended before the next one begins."""
    code.label("gone")
    code.emit("488b2425", memory.stack)  # mov rsp, [stack]
    code.system_call(_OPENAT, Value(memory.group_fd), memory.kill_file, _O_WRONLY | _O_CLOEXEC)
    code.store(memory.scratch)
    code.system_call(_WRITE, Value(memory.scratch), memory.one, 1)
    code.system_call(_CLOSE, Value(memory.scratch))
    code.system_call(_KILL, Value(memory.pid), _SIGKILL)
    code.load(memory.pid)
    code.negate()
    code.store(memory.scratch)
    code.system_call(_KILL, Value(memory.scratch), _SIGKILL)
    code.system_call(_WAIT4, Value(memory.pid), 0, 0, 0)
    code.put(memory.scratch, _TRIES)
    code.label("still there")
    code.system_call(_RMDIR, memory.group)
    code.compare(-_EBUSY)
    code.jump("ended", When.NOT_EQUAL)
    code.system_call(_POLL, 0, 0, _PAUSE_MS)  # the kernel tells nobody when the last one has left a group
    code.set(-1)
    code.add_from(memory.scratch)
    code.store(memory.scratch)
    code.compare(0)
    code.jump("still there", When.GREATER)
    code.label("ended")
    code.call("forget")
    code.jump("idle")


def _stream(code: Assembler, memory: _Memory, name: str, pipe: int, polled: int, kind: bytes) -> None:
    """``pass on`` takes what a poll has found; ``rest of`` takes what is in the pipe now, and no more."""
    code.label(f"pass on {name}")
    code.load_short(polled + _FOUND)
    code.compare(0)
    code.jump(f"nothing of {name}", When.EQUAL)
    code.system_call(_READ, Value(pipe), memory.payload, _PIECE)
    code.compare(0)
    code.jump(f"end of {name}", When.LESS_OR_EQUAL)
    code.put_byte(memory.kind, kind)
    code.call("send")
    code.label(f"nothing of {name}")
    code.give_back()
    code.label(f"end of {name}")
    code.set(-1)
    code.store_int(polled)
    code.give_back()

    code.label(f"rest of {name}")
    code.put(memory.left, 0)
    code.system_call(_IOCTL, Value(pipe), _FIONREAD, memory.left)
    code.label(f"piece of {name}")
    code.load(memory.left)
    code.compare(0)
    code.jump(f"nothing of {name}", When.LESS_OR_EQUAL)
    code.compare(_PIECE)
    code.jump(f"last of {name}", When.LESS_OR_EQUAL)
    code.set(_PIECE)
    code.label(f"last of {name}")
    code.store(memory.room)
    code.system_call(_READ, Value(pipe), memory.payload, Value(memory.room))
    code.compare(0)
    code.jump(f"nothing of {name}", When.LESS_OR_EQUAL)
    code.store(memory.room)
    code.negate()
    code.add_from(memory.left)
    code.store(memory.left)
    code.load(memory.room)
    code.put_byte(memory.kind, kind)
    code.call("send")
    code.jump(f"piece of {name}")


def _send(code: Assembler, memory: _Memory) -> None:
    """One frame of the kind put down, with ``rax`` bytes of payload. The port takes all of it or none."""
    code.label("send")
    code.store_int(memory.size)
    code.add(guest.FRAME.size)
    code.store(memory.total)
    code.label("send again")
    code.system_call(_WRITE, _PORT, memory.frame, Value(memory.total))
    code.compare(0)
    code.jump("sent", When.GREATER)
    code.compare(-_EAGAIN)
    code.jump("gone", When.NOT_EQUAL)
    code.system_call(_POLL, memory.port_polled, 1, _FOREVER)
    code.load_short(memory.port_polled + _FOUND)
    code.keep_bits(_POLLIN | _POLLERR | _POLLHUP)
    code.compare(0)
    code.jump("gone", When.NOT_EQUAL)
    code.jump("send again")
    code.label("sent")
    code.give_back()


def _forget(code: Assembler, memory: _Memory) -> None:
    """Close what was the command's. Its group stays while what was left behind lives in it, and goes later."""
    code.label("forget")
    for descriptor in (memory.out, memory.err, memory.process, memory.group_fd):
        code.system_call(_CLOSE, Value(descriptor))

    code.emit("31db")  # xor ebx, ebx
    code.label("former group")
    code.emit("488b04dd", memory.occupied)  # mov rax, [occupied + rbx * 8]
    code.compare(0)
    code.jump("next group", When.EQUAL)
    code.store(memory.group_token)
    code.system_call(_RMDIR, memory.group)
    code.compare(-_EBUSY)
    code.jump("next group", When.EQUAL)
    code.emit("48c704dd", memory.occupied, 0)  # mov qword [occupied + rbx * 8], 0
    code.label("next group")
    code.emit("ffc383fb10")  # inc ebx; cmp ebx, 16
    code.jump("former group", When.NOT_EQUAL)

    code.load(memory.frame)
    code.store(memory.group_token)
    code.system_call(_RMDIR, memory.group)
    code.compare(-_EBUSY)
    code.jump("forgotten", When.NOT_EQUAL)
    code.emit("488b1c25", memory.last_occupied)  # mov rbx, [last_occupied]
    code.load(memory.frame)
    code.emit("488904dd", memory.occupied)  # mov [occupied + rbx * 8], rax
    code.emit("ffc383e30f")  # inc ebx; and ebx, 15
    code.emit("48891c25", memory.last_occupied)  # mov [last_occupied], rbx
    code.label("forgotten")
    code.set(-1)
    for polled in (memory.out_polled, memory.err_polled, memory.end_polled):
        code.store_int(polled)
    code.give_back()
