"""supervisord: its configuration, and what becomes of the processes it keeps."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from configparser import RawConfigParser
from pathlib import Path

import pytest

from mvm.domain.layout import StateLayout
from mvm.drivers import state_dir
from mvm.drivers.shell import LocalShell
from mvm.drivers.supervisor import Program, Supervisor, check_path, log_of, render_conf, tail
from mvm.errors import Failed, InvalidInput, NotAllowed, Unreachable
from tests.support.local import alive
from tests.support.waiting import until

SLEEP = [sys.executable, "-c", "import signal; print('here', flush=True); signal.pause()"]


@pytest.fixture
def layout() -> Iterator[StateLayout]:
    root = Path(tempfile.mkdtemp(prefix="mvm-t-"))
    layout = StateLayout(root / "s")
    state_dir.prepare(layout)
    yield layout
    Supervisor(layout, LocalShell()).stop()
    shutil.rmtree(root)


@pytest.fixture
def supervisor(layout: StateLayout) -> Supervisor:
    return Supervisor(layout, LocalShell())


def test_conf_is_what_supervisord_reads() -> None:
    layout = StateLayout(Path("/var/lib/m%m"))
    programs = [Program("one", ["run", "it's", "a b"], 10), Program("two", ["x"], 20, stop_s=45, env={"ROLE": "main"})]
    text = render_conf(layout, programs, {"URL": 'redis://:p%40"ss,word@h', "EMPTY": ""}, netns=Path("/run/netns/n"))
    parser = RawConfigParser(inline_comment_prefixes=(";", "#"))
    parser.read_string(text)
    assert parser["unix_http_server"]["file"] == "/var/lib/m%%m/run/supervisor.sock"
    assert parser["program:one"]["environment"] == """URL='redis://:p%%40"ss,word@h',EMPTY="\""""
    command = parser["program:one"]["command"]
    assert command == """nsenter --net=/run/netns/n -- setpriv --pdeathsig TERM run 'it'"'"'s' 'a b'"""
    assert parser["program:two"]["stopwaitsecs"] == "45"
    assert parser["program:two"]["environment"].endswith(',ROLE="main"')
    assert [parser[f"group:p{n}"]["programs"] for n in (10, 20)] == ["one", "two"]


@pytest.mark.parametrize("value", ["a\nb", "a ;b", "a #b", "a'b\"c", '"quoted"'])
def test_conf_refuses_what_it_cannot_carry(value: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        render_conf(StateLayout(Path("/s")), [Program("p", ["x"], 1)], {"X": value}, netns=None)
    assert caught.value.code == "settings.unsupported_value"


def test_a_state_directory_too_deep_for_sockets_is_refused() -> None:
    check_path(StateLayout(Path("/" + "x" * 78)))
    with pytest.raises(InvalidInput) as caught:
        check_path(StateLayout(Path("/" + "x" * 79)))
    assert caught.value.code == "settings.state_dir_too_long"


def test_environment_reaches_the_program_as_it_was(supervisor: Supervisor, layout: StateLayout) -> None:
    value = 'p%40"s,s=w:ö'
    show = [sys.executable, "-c", "import os, signal; print(os.environ['URL'], flush=True); signal.pause()"]
    supervisor.start([Program("show", show, 10)], {"URL": value})
    until(lambda: value in tail(log_of(layout, "show")), 60, "the program has spoken")
    assert (layout.run / "supervisord.conf").stat().st_mode & 0o777 == 0o600


def test_a_part_that_dies_is_started_again(supervisor: Supervisor) -> None:
    supervisor.start([Program("part", SLEEP, 10)], {})
    until(lambda: supervisor.parts()["part"].state == "RUNNING", 60, "the part runs")
    first = supervisor.parts()["part"].pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor.parts()["part"].pid not in (None, first), 60, "another one runs")


def test_a_part_that_was_stopped_is_started_when_it_is_asked_for(supervisor: Supervisor) -> None:
    supervisor.start([Program("part", SLEEP, 10)], {})
    until(lambda: supervisor.parts()["part"].state == "RUNNING", 60, "the part runs")
    supervisor.stop_part("part")
    assert supervisor.parts()["part"].state == "STOPPED"
    for _ in range(2):
        supervisor.start_part("part")
        assert supervisor.parts()["part"].state == "RUNNING"


def test_a_disk_too_full_for_logs_does_not_end_it(supervisor: Supervisor, layout: StateLayout) -> None:
    for name in ("supervisord.log", "supervisord.out", "part.log"):
        (layout.logs / name).symlink_to("/dev/full")
    supervisor.start([Program("part", SLEEP, 10)], {})
    until(lambda: supervisor.parts()["part"].state == "RUNNING", 60, "the part runs")
    first = supervisor.parts()["part"].pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor.parts()["part"].pid not in (None, first), 60, "another one runs")


def test_stop_ends_everything_but_other_sessions(supervisor: Supervisor, layout: StateLayout) -> None:
    """What a part started in a session of its own, as microVMs are, goes on; its other children do not."""
    script = (
        "import signal, subprocess, sys\n"
        "own = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        "print(own.pid, child.pid, flush=True)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "while True: signal.pause()\n"
    )
    file = layout.run / "part.py"
    file.write_text(script)
    supervisor.start([Program("part", [sys.executable, str(file)], 10, stop_s=1)], {})
    until(lambda: len(tail(log_of(layout, "part")).split()) == 2, 60, "the part has its children")
    own, child = map(int, tail(log_of(layout, "part")).split())
    members = supervisor.pids()
    assert child in members
    assert own not in members
    try:
        supervisor.stop()
        assert not any(alive(pid) for pid in members)
        assert alive(own)
    finally:
        os.kill(own, signal.SIGKILL)
    with pytest.raises(Unreachable):
        supervisor.parts()
    supervisor.stop()


def test_nothing_runs_on_when_supervisord_is_killed(supervisor: Supervisor, layout: StateLayout) -> None:
    supervisor.start([Program("part", SLEEP, 10)], {})
    until(lambda: "here" in tail(log_of(layout, "part")), 60, "the part runs")
    members = supervisor.pids()
    os.kill(int((layout.run / "supervisord.pid").read_text()), signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in members), 60, "all are gone")
    assert not supervisor.running()
    supervisor.stop()
    supervisor.start([Program("part", SLEEP, 10)], {})


def test_it_does_not_start_twice(supervisor: Supervisor) -> None:
    supervisor.start([Program("part", SLEEP, 10)], {})
    with pytest.raises(NotAllowed) as caught:
        supervisor.start([Program("part", SLEEP, 10)], {})
    assert caught.value.code == "stack.already_up"


def test_a_supervisord_that_cannot_start_says_why(supervisor: Supervisor, layout: StateLayout) -> None:
    shutil.rmtree(layout.logs / "no", ignore_errors=True)
    with pytest.raises(Failed) as caught:
        supervisor.start([Program("bad name", ["true"], 10)], {})
    assert "bad name" in caught.value.message
