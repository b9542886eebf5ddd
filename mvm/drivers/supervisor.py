"""The stack's process manager: supervisord, its configuration, and talking to it.

supervisord and the parts it starts share one session; microVMs have sessions of their own, so no signal to the
stack reaches them. A part dies with its supervisord (``PR_SET_PDEATHSIG``): nothing runs on unwatched.
"""

from __future__ import annotations

import http.client
import os
import select
import shlex
import signal
import sys
import xmlrpc.client
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, cast

from mvm.domain.layout import MAX_ROOT_BYTES, StateLayout
from mvm.drivers import processes
from mvm.errors import Failed, InvalidInput, NotAllowed, TimedOut, Unreachable
from mvm.ports.shell import Shell

_URL = b"SUPERVISOR_SERVER_URL=unix://"
_START_S = 20.0
_MORE_S = 10.0  # beyond what supervisord itself allows its parts


@dataclass(frozen=True, slots=True)
class Program:
    """One part of the stack. `stop_s` is what it gets after SIGTERM before its process group is killed.

    Parts of a higher `priority` start later and stop earlier; those of one priority stop together.
    """

    name: str
    argv: Sequence[str]
    priority: int
    stop_s: float = 10.0
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PartState:
    """What supervisord says of a part."""

    name: str
    state: str
    pid: int | None
    since: datetime | None


def check_path(layout: StateLayout) -> None:
    """Raises `InvalidInput` (``settings.state_dir_too_long``) when a Unix socket would not fit below it."""
    length = len(os.fsencode(layout.root))
    if length > MAX_ROOT_BYTES:
        raise InvalidInput(
            "settings.state_dir_too_long", f"the state directory's path has {length} bytes: Unix sockets would not fit",
            hint=f"allowed: at most {MAX_ROOT_BYTES} bytes, such as /var/lib/mvm", field="state_dir",
            value=str(layout.root),
        )  # fmt: skip


def render_conf(
    layout: StateLayout, programs: Sequence[Program], environment: Mapping[str, str], *, netns: Path | None
) -> str:
    """supervisord's configuration; the programs run inside the namespace at `netns`, if any.

    Raises `InvalidInput` (``settings.unsupported_value``) for values that its syntax cannot carry.
    """
    lines = [
        "[unix_http_server]",
        f"file={_value(str(_socket(layout)))}",
        "chmod=0700",
        "[supervisord]",
        "nodaemon=true",
        "silent=true",
        "nocleanup=true",
        f"logfile={_value(str(layout.logs / 'supervisord.log'))}",
        "logfile_maxbytes=5MB",
        "logfile_backups=2",
        f"pidfile={_value(str(_pidfile(layout)))}",
        f"childlogdir={_value(str(layout.logs))}",
        f"directory={_value(str(layout.root))}",
        *(["user=root"] if os.geteuid() == 0 else []),
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
    ]
    enter = ["nsenter", f"--net={netns}", "--"] if netns else []
    for program in programs:
        argv = [*enter, "setpriv", "--pdeathsig", "TERM", *program.argv]
        lines += [
            f"[program:{program.name}]",
            f"command={_value(shlex.join(argv))}",
            f"environment={_environment({**environment, **program.env})}",
            "umask=077",
            "autorestart=true",
            "startsecs=1",
            "startretries=100",
            "stopsignal=TERM",
            f"stopwaitsecs={max(1, round(program.stop_s))}",
            # TERM goes to the part alone, which ends its own children in order; KILL takes them along.
            "stopasgroup=false",
            "killasgroup=true",
            "redirect_stderr=true",
            f"stdout_logfile={_value(_value(str(log_of(layout, program.name))))}",  # it is expanded twice
            "stdout_logfile_maxbytes=10MB",
            "stdout_logfile_backups=3",
        ]
    for priority in sorted({p.priority for p in programs}):
        names = ",".join(p.name for p in programs if p.priority == priority)
        lines += [f"[group:p{priority}]", f"programs={names}", f"priority={priority}"]
    return "\n".join(lines) + "\n"


def log_of(layout: StateLayout, name: str) -> Path:
    """A part's log."""
    return layout.logs / f"{name}.log"


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log; empty when there is none."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 16_384))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


class Supervisor:
    """The supervisord of one state directory."""

    def __init__(self, layout: StateLayout, shell: Shell) -> None:
        self._layout = layout
        self._shell = shell

    def start(self, programs: Sequence[Program], environment: Mapping[str, str], *, netns: Path | None = None) -> None:
        """Start it with these programs and wait until it answers.

        Raises `NotAllowed` (``stack.already_up``) and `Failed` (``stack.start_failed``) with its last words.
        """
        check_path(self._layout)
        if self.running():
            raise already_up(self._layout)
        conf = render_conf(self._layout, programs, environment, netns=netns)
        path = self._layout.run / "supervisord.conf"
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(conf)
        log = self._layout.logs / "supervisord.out"
        form = environment.get("MVM_LOG_FORMAT", "text")
        process = self._shell.spawn([sys.executable, "-m", "mvm.drivers.supervisord", form, "-c", str(path)], log=log)
        deadline = monotonic() + _START_S
        while not self.running():
            # Nothing tells when its socket answers, but its end can be waited for meanwhile.
            if processes.wait_gone(process, 0.05) or monotonic() > deadline:
                raise Failed("stack.start_failed", f"supervisord did not start:\n{tail(log)}", hint=f"see {log}")

    def running(self) -> bool:
        """Whether its control socket answers."""
        try:
            return bool(self._call("getState"))
        except Unreachable:
            return False

    def parts(self) -> dict[str, PartState]:
        """Every part by name. Raises `Unreachable` (``stack.down``)."""
        found = {}
        for info in self._call("getAllProcessInfo"):
            running = info["statename"] in ("STARTING", "RUNNING", "STOPPING")
            found[info["name"]] = PartState(
                name=info["name"],
                state=info["statename"],
                pid=info["pid"] or None,
                since=datetime.fromtimestamp(info["start"], UTC) if running and info["start"] else None,
            )
        return found

    def stop_part(self, name: str) -> None:
        """Stop one part and wait for its end; it is not started again."""
        for info in self._call("getAllProcessInfo"):
            if info["name"] == name and info["statename"] in ("STARTING", "RUNNING", "BACKOFF"):
                self._call("stopProcess", f"{info['group']}:{name}")

    def start_part(self, name: str) -> None:
        """Start one part that was stopped, and see it stay up for a second; one that runs is left alone."""
        for info in self._call("getAllProcessInfo"):
            if info["name"] == name and info["statename"] in ("STOPPED", "EXITED", "FATAL"):
                self._call("startProcess", f"{info['group']}:{name}")

    def wait(self) -> None:
        """Wait until supervisord has ended."""
        session = self._session()
        fd = _pidfd(session) if session else None
        if fd is not None:
            with os.fdopen(fd):
                _wait([fd], None)

    def pids(self) -> frozenset[int]:
        """supervisord and every process of its session, also those that outlived it."""
        session = self._session()
        return self._pids(session) if session else frozenset()

    def _session(self) -> int | None:
        try:
            return int(_pidfile(self._layout).read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _pids(self, session: int) -> frozenset[int]:
        marks = (os.fsencode(f"SUPERVISOR_SERVER_URL=unix://{_socket(self._layout)}"), os.fsencode(str(self._conf())))
        run = self._layout.run
        return frozenset(pid for pid in _session(session) if _marked(pid, marks) or _works_at(pid, run))

    def stop(self) -> None:
        """Stop all parts and supervisord and wait until every process of them is gone; nothing when none is there.

        Raises `TimedOut` (``stack.stop_timeout``) when the kernel does not even end killed processes.
        """
        session = self._session()
        if session is None:
            return
        patience = _MORE_S
        try:
            patience += self._patience()
            self._call("shutdown")
        except Unreachable:  # it is gone: the parts were signalled when it went
            _signal(self._pids(session), signal.SIGTERM)
        if not self._gone(session, patience):
            _signal(self._pids(session), signal.SIGKILL)
            if not self._gone(session, _MORE_S):
                raise TimedOut("stack.stop_timeout", f"processes do not end: {sorted(self._pids(session))}")
        for path in (_pidfile(self._layout), _socket(self._layout)):
            path.unlink(missing_ok=True)

    def _gone(self, session: int, within_s: float) -> bool:
        deadline = monotonic() + within_s
        while left := self._pids(session):
            fds = [fd for fd in map(_pidfd, left) if fd is not None]
            try:
                # Each of them: one that is ending has no environment any more, and its files are still open.
                if not all(_wait([fd], max(0.0, deadline - monotonic())) for fd in fds):
                    return False
            finally:
                for fd in fds:
                    os.close(fd)
            if monotonic() > deadline:
                return False
        return True

    def _patience(self) -> float:
        """The longest that supervisord takes to stop its parts, one priority after the other."""
        longest: dict[str, int] = {}
        for config in self._call("getAllConfigInfo"):
            longest[config["group"]] = max(longest.get(config["group"], 0), config["stopwaitsecs"])
        return float(sum(longest.values()))

    def _conf(self) -> Path:
        return self._layout.run / "supervisord.conf"

    def _call(self, method: str, *words: str) -> Any:
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{_socket(self._layout)}")
        try:
            proxy = xmlrpc.client.ServerProxy("http://localhost", transport=cast("Any", transport))
            return getattr(cast("Any", proxy).supervisor, method)(*words)
        except (OSError, http.client.HTTPException, xmlrpc.client.Error):
            raise Unreachable("stack.down", "the stack is not running", hint="mvm up --detach") from None
        finally:
            transport.close()


def already_up(layout: StateLayout) -> NotAllowed:
    """The stack of this state directory runs already."""
    return NotAllowed(
        "stack.already_up", f"the stack of {layout.root} is already up",
        hint="see: mvm status; another stack needs another MVM_STATE_DIR", state_dir=str(layout.root),
    )  # fmt: skip


def _socket(layout: StateLayout) -> Path:
    return layout.run / "supervisor.sock"


def _pidfile(layout: StateLayout) -> Path:
    return layout.run / "supervisord.pid"


def _value(text: str) -> str:
    """`text` in supervisord's syntax, where % expands and a semicolon or hash after a space begins a comment."""
    if any(ord(c) < 32 for c in text) or " ;" in text or " #" in text or "%(here)s" in text:
        raise InvalidInput(
            "settings.unsupported_value",
            f"{text!r} has characters that supervisord cannot carry",
            hint="choose a path or value without control characters, ' ;', ' #' and '%(here)s'",
        )
    return text.replace("%", "%%")


def _environment(values: Mapping[str, str]) -> str:
    pairs = []
    for name, value in values.items():
        quote = "'" if '"' in value else '"'
        if quote in value or value.strip("'\"") != value:
            raise InvalidInput("settings.unsupported_value", f"{name} has quotes that supervisord cannot carry",
                               hint="write the value without quotes", field=name)  # fmt: skip
        pairs.append(f"{name}={quote}{_value(value)}{quote}")
    return ",".join(pairs)


def _session(session: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208 - names are wanted, not paths
        if name.isdecimal():
            try:
                stat = Path("/proc", name, "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            state, _ppid, _group, sid = stat.rpartition(")")[2].split()[:4]
            if int(sid) == session and state not in "ZX":
                found.append(int(name))
    return found


def _marked(pid: int, marks: Sequence[bytes]) -> bool:
    """Whether a process of the session is ours: the session's number alone may have been given again."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    return any(mark in words for mark in marks)


def _works_at(pid: int, run: Path) -> bool:
    """Whether its environment or its command line names `run`, by whatever path."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes() + b"\0" + Path(f"/proc/{pid}/cmdline").read_bytes()
        wanted = [word for word in words.split(b"\0") if word.startswith(_URL) or word.endswith(b"/supervisord.conf")]
        named = [Path(os.fsdecode(word.rpartition(b"unix://")[2])).parent for word in wanted]
        return any(path.samefile(run) for path in named)
    except OSError:
        return False


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _wait(fds: Sequence[int], within_s: float | None) -> bool:
    """Whether one of these became readable in time."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if within_s is None else max(0, within_s) * 1000))


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
