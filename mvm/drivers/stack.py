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

from mvm.domain.identity import Claim, namespace_words
from mvm.domain.layout import STATE_VERSION, StateLayout
from mvm.domain.migration import settings_of
from mvm.drivers import claims, identity, isolation, netns, redis_files, remains, state_dir, supervisor, uplink
from mvm.drivers.cgroups import LinuxCgroups
from mvm.drivers.files import write_private
from mvm.drivers.probes import WORKERS, Probes, agent_address
from mvm.drivers.registry_upkeep import RegistryUpkeep
from mvm.drivers.supervisor import Program, Supervisor
from mvm.errors import Failed, Forbidden, MvmError, NotAllowed, Unreachable
from mvm.ports.queue import node_queue
from mvm.ports.shell import Shell
from mvm.settings import Settings

Report = Callable[[str], None]
_READY_S = 120.0
_ASK_AGAIN_S = 0.25  # each asking takes CPU from what is to answer
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
            python, "-m", "celery", "-q", "-A", "workers.app", "worker", "-n", f"{WORKERS[name]}@{node}", "-Q", queue,
            "-P", "threads", "-c", str(threads), "--without-gossip", "--without-mingle", "-E", "-l", "INFO",
        ]  # fmt: skip
        return Program(name, argv, 20, patience, {"MVM_WORKER_ROLE": WORKERS[name]})

    beat = [python, "-m", "celery", "-q", "-A", "beat.app", "beat", "--pidfile=", "-l", "INFO"]
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
        "version": STATE_VERSION,
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
        saved = json.loads(settings.layout.settings.read_text())
    except FileNotFoundError:
        return settings
    except PermissionError:
        raise state_dir.denied(settings.layout.root) from None
    known = settings_of(saved, found or STATE_VERSION, tuple(Settings.model_fields))
    if _is_anothers(saved, settings.layout):
        known["netns"] = ""  # the original's
    known["netns"] = known.get("netns") or identity.default_netns(settings.layout)
    return Settings(**known | {"state_dir": settings.state_dir})


def _is_anothers(saved: Mapping[str, Any], layout: StateLayout) -> bool:
    """Whether the settings were kept for another directory that is still there, of which this one is a copy."""
    try:
        return not Path(saved["state_dir"]).samefile(layout.root)
    except (KeyError, OSError):
        return False


class Stack:
    """The stack of one state directory. `parts` are those that have to answer."""

    def __init__(self, settings: Settings, shell: Shell, parts: Sequence[Program] | None = None) -> None:
        supervisor.check_path(settings.layout)
        self._settings = settings
        self._layout = settings.layout
        self._shell = shell
        self._given = parts
        self._programs = programs(settings) if parts is None else parts
        self._supervisor = Supervisor(settings.layout, shell)
        self._registry = RegistryUpkeep(settings, shell)
        self._probes = Probes(settings)
        self._external = ("redis",) if settings.redis_url else ()

    @property
    def settings(self) -> Settings:
        """What it is started with: those that were given, and what the state directory remembers."""
        return self._settings

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what has to answer."""
        names = [p.name for p in self._programs]
        return (*self._external, *names, *(["metrics"] if "agent" in names else []))

    def prepare_alone(self, report: Report) -> None:
        """The state directory is ready for a stack that others start; one that runs already is left alone."""
        self.prepare(report)
        with state_dir.held(self._layout):
            if not self._registry.is_served():
                self._registry.make_ready(report)
                self._registry.migrate_before_it_is_started()
        self.publish()

    def prepare(self, report: Report = lambda _: None) -> None:
        """The state directory exists, with all keys and certificates."""
        from mvm.drivers.quic import certs

        state_dir.prepare(self._layout)
        with state_dir.held(self._layout):
            known = identity.settle(self._settings)
        self._settings = self._settings.model_copy(
            update={"node_id": str(known.node_id), "netns": self._settings.netns or known.netns}
        )
        self._registry = RegistryUpkeep(self._settings, self._shell)
        self._probes = Probes(self._settings)
        self._programs = programs(self._settings) if self._given is None else self._given
        for note in certs.init(self._layout, self._settings.node):
            report(f"WARNING: {note}")
        self._layout.metrics.mkdir(mode=0o700, exist_ok=True)

    def publish(self) -> None:
        """Write down for commands how to reach the stack."""
        _write(self._layout.connection, connection(self._settings))

    def is_published(self) -> bool:
        """Whether commands can reach it: else whoever started it was killed before it was done."""
        return self._layout.connection.exists()

    def remaining(self) -> Sequence[str]:
        """What shows that an instance has a VMM, a line each; empty when none has."""
        return self._left_by(self._settings)

    def _left_by(self, former: Settings) -> Sequence[str]:
        """What remains of the instances of a stack with these settings."""
        if former.driver == "fake":
            return remains.recorded_up(self._layout)
        return remains.remaining(self._layout, self._made_namespace() or former.namespace)

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
                if self.is_published():
                    raise supervisor.already_up(self._layout)
                report("who started it was killed before it was done: what runs of it is taken down and started anew")
            self._check_reach()
            self._check_claim()
            self._supervisor.stop()  # what is left of one that was killed
            self._registry.check_unserved()
            self._check_ports()
            self._check_isolation(report)
            self._registry.make_ready(report)
            try:
                self._start(report)
                self._wait_ready(report)
                if "redis" in self.parts and not self._external:
                    self._registry.migrate()
                self.publish()
                self._tell_of_uplink(report)
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

    def start_part(self, name: str) -> None:
        """Start one part that was stopped. Raises `Unreachable` (``stack.down``)."""
        self._supervisor.start_part(name)

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
        for name, answer in self._probes.ask_all(self.parts, states).items():
            state = states.get("agent" if name == "metrics" else name)
            if state:  # supervisord calls a part "starting" for its first second, whatever it answers
                word = "running" if answer.well else state.state.lower()
                found.append(Part(name, word, state.pid, state.since, answer.well, answer.note))
            else:
                found.append(Part(name, "external", None, None, answer.well, answer.note))
        return found

    def _start(self, report: Report) -> None:
        namespace = self._settings.namespace
        self._layout.connection.unlink(missing_ok=True)
        if namespace:
            self._own_namespace(namespace, report)
        self._give_up_former()
        if self._claims:
            claims.take(namespace, self._claim)
        self._tell_of_lost_networks(report)
        self._check_external()
        for stale in (self._layout.metrics, self._layout.redis_socket):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
        self._layout.metrics.mkdir(mode=0o700)
        _write(self._layout.settings, self._settings.model_dump(mode="json"))
        report("starting " + ", ".join(p.name for p in self._programs))
        environment = {
            **self._settings.environment(),
            "PROMETHEUS_MULTIPROC_DIR": str(self._layout.metrics),
            "PYTHONUNBUFFERED": "1",
        }
        path = netns.path_of(namespace) if namespace else None
        self._supervisor.start(self._programs, environment, netns=path)

    def _check_reach(self) -> None:
        """What runs on stays within reach: in another network namespace, or by another driver, nobody would find it."""
        former = running_settings(self._settings)
        home = self._made_namespace() or former.namespace
        moves = former.driver == "qemu" and home != self._settings.namespace
        if (former.driver == self._settings.driver and not moves) or not (left := self._left_by(former)):
            return
        if former.driver != self._settings.driver:
            raise NotAllowed(
                "stack.other_driver", f"instances of this state directory run on, by driver {former.driver}: {left[0]}",
                hint=f"use --driver {former.driver}, or stop them first", driver=former.driver,
            )  # fmt: skip
        raise NotAllowed(
            "stack.other_netns", f"instances of this state directory run on in {namespace_words(home)}: {left[0]}",
            hint=f"use --netns {home or 'host'}, or stop them first", netns=home,
        )  # fmt: skip

    @property
    def _claims(self) -> bool:
        """Whether its network namespace has anything of ours in it; the fake driver makes nothing in the host's."""
        return self._settings.driver != "fake" or self._settings.namespace is not None

    @property
    def _claim(self) -> Claim:
        return Claim(identity.mark(self._layout), str(self._layout.root))

    def _check_claim(self) -> None:
        """A network namespace is one state directory's: what another has claimed, or uses unclaimed, is let be."""
        name = self._settings.namespace
        if not self._claims or (name and not netns.exists(name)):
            return
        if there := claims.holder(name):
            there.check(self._claim, name)
            return
        taps = claims.held_taps(name)
        if taps and self._made_namespace() != name and not remains.vmms(self._layout):
            raise NotAllowed(
                "stack.netns_claimed",
                f"{namespace_words(name)} has microVMs that are not this state directory's: TAP {taps[0]}",
                hint="use another namespace, or leave --netns away for one of your own", netns=name,
            )  # fmt: skip

    def _give_up_former(self) -> None:
        former = running_settings(self._settings).namespace
        if os.geteuid() == 0 and former != self._settings.namespace:
            claims.release(former, self._claim.mark)

    def _made_namespace(self) -> str | None:
        """The network namespace that a stack of this state directory made and that is still there."""
        mark = self._layout.made_netns
        name = mark.read_text().strip() if mark.exists() else ""
        return name if name and netns.exists(name) and remains.owns(self._layout, name) else None

    def _own_namespace(self, name: str, report: Report) -> None:
        """Write down that the namespace will be ours before it is made, so that a crash leaves none unowned."""
        former = self._made_namespace()
        if former and former != name:
            netns.delete(self._shell, former)
        if not netns.exists(name):
            report(f"creating network namespace {name}")
            write_private(self._layout.made_netns, name.encode())
        netns.create(self._shell, name)
        if self._made_namespace() == name:  # also one that an older mvm made
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
            for name, answer in self._probes.ask_all(waiting, states).items():
                if answer.well:
                    del waiting[name]
                    report(f"{name} answers")
                else:
                    waiting[name] = answer.note or ""
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
        missing = isolation.lacking(self._shell, LinuxCgroups(identity.mark(self._layout)))
        if self._settings.require_isolation:
            isolation.check(missing)
        for name, why in missing.items():
            report(f"WARNING: guests are not fully isolated: no {name} limit: {why}" if name != "cage" else
                   f"WARNING: guests will not start, for QEMU cannot be caged: {why}")  # fmt: skip

    def _tell_of_uplink(self, report: Report) -> None:
        """Told where guests of a pool would reach nothing outside; they run all the same, and so does the stack."""
        if self._settings.driver == "fake":
            return
        try:
            lacking = uplink.lacking(self._settings)
        except MvmError as error:
            lacking = f"it cannot be told whether pools that reach outside have their uplink: {error.message}"
        if lacking:
            report(f"WARNING: {lacking}")

    def _tell_of_lost_networks(self, report: Report) -> None:
        """Told of guests whose namespace went while their VMMs ran on: a VMM has its TAP once and for all."""
        if self._settings.driver == "fake":
            return
        try:
            lost = remains.cut_off(self._layout, self._settings.namespace)
        except MvmError as error:
            report(f"WARNING: it cannot be told whether guests have lost their network: {error.message}")
            return
        for ref in lost:
            restart = f"mvm instance stop {ref}; then: mvm instance start {ref}"
            report(f"WARNING: {ref} runs on and has lost its network, until it is started anew: {restart}")

    def _check_external(self) -> None:
        hint = "see MVM_REDIS_URL"
        if self._settings.namespace and not self._settings.redis_url.startswith("unix:"):
            hint += "; a new network namespace reaches no other host: give a Unix socket, or --netns host"
        for name in self._external:
            answer = self._probes.ask(name, {})
            if not answer.well:
                raise Unreachable("registry.unreachable", answer.note or "", hint=hint)
            self._registry.migrate()

    def _down(self, report: Report) -> None:
        if self._supervisor.pids():
            report("stopping the stack")
        self._layout.connection.unlink(missing_ok=True)
        self._supervisor.stop()
        name = self._made_namespace()
        if why := self._why_it_stays():
            report(f"{why}; network namespace {name} stays" if name else why)
            return
        if self._claims and os.geteuid() == 0:
            claims.release(self._settings.namespace, self._claim.mark)
        if name:  # not the same where it was started elsewhere since
            netns.delete(self._shell, name)
        self._layout.made_netns.unlink(missing_ok=True)
        LinuxCgroups(identity.mark(self._layout)).close()

    def _why_it_stays(self) -> str | None:
        """Why what instances need has to stay; None when none of them has a VMM. What cannot be read may have one."""
        try:
            return "instances run on" if self.remaining() else None
        except MvmError as error:
            return f"WARNING: it cannot be told whether instances run on: {error.message}"


def _write(path: Path, value: Mapping[str, Any]) -> None:
    write_private(path, json.dumps(value, indent=2).encode())
