"""The stack of one node: what it consists of, and bringing it up and down."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

from mvm.domain.layout import STATE_VERSION, StateLayout
from mvm.domain.migration import settings_of
from mvm.drivers import isolation, netns, redis_files, state_dir, supervisor
from mvm.drivers.cgroups import LinuxCgroups
from mvm.drivers.probes import WORKERS, Probes, agent_address
from mvm.drivers.qemu.argv import marker
from mvm.drivers.supervisor import Program, Supervisor
from mvm.drivers.upgrade import upgrade
from mvm.errors import Failed, Forbidden, MvmError, NotAllowed, Unreachable
from mvm.ports.queue import node_queue
from mvm.ports.shell import Shell
from mvm.settings import Settings

Report = Callable[[str], None]
_READY_S = 120.0
_ASK_AGAIN_S = 0.1
_GIVE_UP_AFTER = 3  # processes of one part, one after the other


@dataclass(frozen=True, slots=True)
class Part:
    """One part as people see it; `note` says what is wrong when it does not answer."""

    name: str
    state: str
    pid: int | None
    since: datetime | None
    answers: bool
    note: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        since = self.since.isoformat() if self.since else None
        return {"name": self.name, "state": self.state, "pid": self.pid, "since": since, "answers": self.answers,
                "note": self.note}  # fmt: skip


def programs(settings: Settings) -> tuple[Program, ...]:
    """The processes of the stack."""
    layout, node, python = settings.layout, settings.node, sys.executable
    # A worker waits for the jobs it holds; one that is cut off is delivered again at the next start.
    patience = settings.boot_deadline_s + settings.stop_grace_s + 5

    def worker(name: str, queue: str, threads: int) -> Program:
        argv = [
            python, "-m", "celery", "-A", "workers.app", "worker", "-n", f"{WORKERS[name]}@{node}", "-Q", queue,
            "-P", "threads", "-c", str(threads), "--without-gossip", "--without-mingle", "-E", "-l", "INFO",
        ]  # fmt: skip
        return Program(name, argv, 20, patience, {"MVM_WORKER_ROLE": WORKERS[name]})

    beat = [python, "-m", "celery", "-A", "beat.app", "beat", "--pidfile=", "-l", "INFO"]
    redis = redis_files.server(layout.redis, layout.redis_socket)
    queue = node_queue(node)
    metadata = Program("metadata", ["nice", "-n", "10", python, "-m", "mvm.metadata"], 20)
    return (
        *(() if settings.redis_url else (Program("redis", redis, 10),)),
        worker("worker", queue, settings.worker_threads),
        worker("urgent", f"{queue}.urgent", settings.urgent_threads),
        Program("beat", beat, 20),
        # Who asks the agent waits, who looks at Flower does not; coreutils' nice goes on where it may not.
        Program("agent", ["nice", "-n", "-10", python, "-m", "mvm.agent"], 20),
        *((metadata,) if settings.driver != "fake" else ()),
        Program("flower", ["nice", "-n", "10", python, "-m", "workers.flower"], 20),
    )


def connection(settings: Settings) -> dict[str, Any]:
    """What a command needs to reach the stack."""
    return {
        "node_id": str(settings.node),
        "redis_url": settings.redis,
        "broker_url": settings.broker,
        "job_expires_s": settings.job_expires_s,
        "agent_address": agent_address(settings),
        "netns": settings.namespace,
        "flower_url": f"http://127.0.0.1:{settings.flower_port}",
        "metrics_url": f"http://127.0.0.1:{settings.metrics_port}/metrics",
    }


def running_settings(settings: Settings) -> Settings:
    """The settings that the stack of this state directory was started with; `settings` when there are none.

    Raises `NotAllowed` (``state.version``) when a newer mvm has started it.
    """
    found = state_dir.check_version(settings.layout)
    try:
        saved = json.loads(_saved(settings.layout).read_text())
        return Settings(**settings_of(saved, found or STATE_VERSION, tuple(Settings.model_fields)))
    except FileNotFoundError:
        return settings
    except PermissionError:
        raise state_dir.denied(settings.layout.root) from None


class Stack:
    """The stack of one state directory. `parts` are those that have to answer."""

    def __init__(self, settings: Settings, shell: Shell, parts: Sequence[Program] | None = None) -> None:
        supervisor.check_path(settings.layout)
        self._settings = settings
        self._layout = settings.layout
        self._shell = shell
        self._programs = programs(settings) if parts is None else parts
        self._supervisor = Supervisor(settings.layout, shell)
        self._probes = Probes(settings)
        self._external = ("redis",) if settings.redis_url else ()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what has to answer."""
        names = [p.name for p in self._programs]
        return (*self._external, *names, *(["metrics"] if "agent" in names else []))

    def prepare_alone(self, report: Report) -> None:
        """The state directory is ready for a stack that others start; one that runs already is left alone."""
        self.prepare(report)
        with state_dir.held(self._layout):
            if self._probes.ask("redis", {}) is not None or self._external:
                self._make_ready(report)
        self.publish()

    def _make_ready(self, report: Report) -> None:
        """What is kept is of this version, and can be read. Nothing of the stack runs."""
        if not self._settings.redis_url:
            redis_files.mend(self._layout.redis, self._shell, report)
        upgrade(self._settings, self._shell, report)

    def prepare(self, report: Report = lambda _: None) -> None:
        """The state directory exists, with all keys and certificates."""
        from mvm.drivers.quic import certs

        state_dir.prepare(self._layout)
        for note in certs.init(self._layout, self._settings.node):
            report(f"WARNING: {note}")
        self._layout.metrics.mkdir(mode=0o700, exist_ok=True)

    def publish(self) -> None:
        """Write down for commands how to reach the stack."""
        _write(self._layout.connection, connection(self._settings))

    def instances_remain(self) -> bool:
        """Whether something runs on in the namespace that we made."""
        mark = _namespace_mark(self._layout)
        return mark.exists() and netns.exists(mark.read_text().strip()) and _is_used(mark.read_text().strip())

    def up(self, report: Report) -> None:
        """Start everything and return once every part has answered; what was begun is undone on failure.

        Raises `Forbidden` (``permission.root``), `NotAllowed` (``stack.already_up``, ``stack.port_taken``,
        ``state.version``...), `Failed` (``stack.part_failed``) with the part's last words.
        """
        if os.geteuid() != 0 and (self._settings.driver != "fake" or self._settings.namespace):
            raise Forbidden("permission.root", "network namespaces, bridges and microVMs need root",
                            hint="run it as root, or without guests: --driver fake --netns host")  # fmt: skip
        self.prepare(report)
        with state_dir.held(self._layout):
            if self._supervisor.running():
                raise supervisor.already_up(self._layout)
            self._supervisor.stop()  # what is left of one that was killed
            self._check_ports()
            self._check_isolation(report)
            self._make_ready(report)
            try:
                self._start(report)
                self._wait_ready(report)
                self.publish()
            except BaseException:
                try:
                    self._down(report)
                except MvmError as error:  # the first failure is the one to hear of
                    report(f"taking it down again failed: {error.message}")
                raise

    def down(self, report: Report) -> None:
        """Stop everything but the instances and wait until it is gone; nothing to do is fine."""
        if state_dir.check_version(self._layout) is None:
            return
        self._layout.locks.mkdir(mode=0o700, exist_ok=True)
        with state_dir.held(self._layout):
            self._down(report)

    def stop_part(self, name: str) -> None:
        """Stop one part for good. Raises `Unreachable` (``stack.down``)."""
        self._supervisor.stop_part(name)

    def watch(self) -> None:
        """Wait for the end of supervisord; raises `Failed` (``stack.died``) when it comes."""
        self._supervisor.wait()
        raise Failed("stack.died", "supervisord has ended", hint=f"see {self._layout.logs / 'supervisord.log'}")

    def status(self) -> list[Part]:
        """Every part, asked now."""
        try:
            states = self._supervisor.parts()
        except Unreachable:
            return [Part(name, "stopped", None, None, False, "not running") for name in self.parts]
        found = []
        for name, note in self._probes.ask_all(self.parts, states).items():
            state = states.get("agent" if name == "metrics" else name)
            if state:  # supervisord calls a part "starting" for its first second, whatever it answers
                word = "running" if note is None else state.state.lower()
                found.append(Part(name, word, state.pid, state.since, note is None, note))
            else:
                found.append(Part(name, "external", None, None, note is None, note))
        return found

    def _start(self, report: Report) -> None:
        namespace = self._settings.namespace
        self._layout.connection.unlink(missing_ok=True)
        if namespace:
            self._own_namespace(namespace, report)
        self._check_external()
        for stale in (self._layout.metrics, self._layout.redis_socket):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
        self._layout.metrics.mkdir(mode=0o700)
        _write(_saved(self._layout), self._settings.model_dump(mode="json"))
        report("starting " + ", ".join(p.name for p in self._programs))
        environment = {
            **self._settings.environment(),
            "PROMETHEUS_MULTIPROC_DIR": str(self._layout.metrics),
            "PYTHONUNBUFFERED": "1",
        }
        path = netns.path_of(namespace) if namespace else None
        self._supervisor.start(self._programs, environment, netns=path)

    def _own_namespace(self, name: str, report: Report) -> None:
        """Write down that the namespace will be ours before it is made, so that a crash leaves none unowned."""
        mark = _namespace_mark(self._layout)
        former = mark.read_text().strip() if mark.exists() else ""
        if former and former != name and netns.exists(former):
            if _is_used(former):
                raise NotAllowed(
                    "stack.other_netns", f"instances of this state directory run in network namespace {former}",
                    hint=f"use --netns {former}, or stop them first", netns=former,
                )  # fmt: skip
            netns.delete(self._shell, former)
        if not netns.exists(name):
            report(f"creating network namespace {name}")
            mark.write_text(name)
        netns.create(self._shell, name)
        if mark.exists() and mark.read_text().strip() == name:  # also one that an older mvm made
            with netns.entered(netns.path_of(name)):
                netns.keep_bridged_frames_from_ip()

    def _wait_ready(self, report: Report) -> None:
        waiting = dict.fromkeys(self.parts, "")
        lives: dict[str, set[int | None]] = {}
        deadline = monotonic() + _READY_S
        pause = Event()
        while waiting:
            states = self._supervisor.parts()
            for name, state in states.items():
                lives.setdefault(name, set()).add(state.pid)
                if state.state == "FATAL" or len(lives[name]) > _GIVE_UP_AFTER:
                    raise self._failed(name, "does not stay up")
            for name, problem in self._probes.ask_all(waiting, states).items():
                if problem is None:
                    del waiting[name]
                    report(f"{name} answers")
                else:
                    waiting[name] = problem
            if waiting and monotonic() > deadline:
                name, problem = next(iter(waiting.items()))
                raise self._failed(name, f"did not answer within {_READY_S:g} s: {problem}")
            if waiting:
                pause.wait(_ASK_AGAIN_S)

    def _failed(self, name: str, why: str) -> Failed:
        log = supervisor.log_of(self._layout, "agent" if name == "metrics" else name)
        return Failed("stack.part_failed", f"{name} {why}; its last words:\n{supervisor.tail(log)}",
                      hint=f"see {log}", part=name)  # fmt: skip

    def _check_ports(self) -> None:
        ports = {"flower": self._settings.flower_port, "metrics": self._settings.metrics_port}
        for name, port in ports.items():
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    sock.bind(("127.0.0.1", port))
                except OSError as error:
                    flag = "--flower-port" if name == "flower" else "MVM_METRICS_PORT"
                    raise NotAllowed(
                        "stack.port_taken", f"{name}'s port 127.0.0.1:{port}: {error.strerror}",
                        hint=f"choose another with {flag}", port=port,
                    ) from None  # fmt: skip

    def _check_isolation(self, report: Report) -> None:
        """Loud where guests would not be kept apart as well as they can be; an error where that is required."""
        if self._settings.driver == "fake":
            return
        missing = isolation.lacking(self._shell, LinuxCgroups(marker(self._layout.root)))
        if self._settings.require_isolation:
            isolation.check(missing)
        for name, why in missing.items():
            report(f"WARNING: guests are not fully isolated: no {name} limit: {why}" if name != "cage" else
                   f"WARNING: guests will not start, for QEMU cannot be caged: {why}")  # fmt: skip

    def _check_external(self) -> None:
        hint = "see MVM_REDIS_URL"
        if self._settings.namespace and not self._settings.redis_url.startswith("unix:"):
            hint += "; a new network namespace reaches no other host: give a Unix socket, or --netns host"
        for name in self._external:
            problem = self._probes.ask(name, {})
            if problem:
                raise Unreachable("registry.unreachable", problem, hint=hint)

    def _down(self, report: Report) -> None:
        if self._supervisor.pids():
            report("stopping the stack")
        self._layout.connection.unlink(missing_ok=True)
        self._supervisor.stop()
        mark = _namespace_mark(self._layout)
        if mark.exists():
            name = mark.read_text().strip()
            if netns.exists(name) and _is_used(name):
                report(f"instances run on; network namespace {name} stays")
                return
            netns.delete(self._shell, name)
            mark.unlink()
        LinuxCgroups(marker(self._layout.root)).close()


def _is_used(namespace: str) -> bool:
    """Whether any process lives in it."""
    wanted = netns.path_of(namespace).stat()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                found = (entry / "ns/net").stat()
            except (FileNotFoundError, ProcessLookupError):
                continue
            except PermissionError:  # of a stronger user: none that we started
                continue
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def _write(path: Path, value: Mapping[str, Any]) -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(value, file, indent=2)
    draft.rename(path)


def _saved(layout: StateLayout) -> Path:
    return layout.run / "settings.json"


def _namespace_mark(layout: StateLayout) -> Path:
    return layout.run / "netns"
