"""Help texts: every option that has a default says which, and it is the one that holds."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from mvm.cli.main import cli
from mvm.domain.egress import Egress
from mvm.domain.pool import InstanceResources, SeccompPolicy, SleepPolicy
from mvm.domain.snapshot import Compression
from mvm.domain.tenant import Quota
from mvm.domain.vmm import OnExit
from mvm.settings import Settings

_NONE_GIVEN = {"--allow", "--expect", "--report", "--subject", "--user-data"}
"""Without these there is nothing of the kind."""

_NARROWS = {"--pool", "--state", "--status", "--tenant"}
_UPDATES = {"pool update", "pool scale", "tenant update"}
"""What is not given to these stays as it is; they say so."""

_SHAPE, _SLEEP, _QUOTA, _SETTINGS = InstanceResources(), SleepPolicy(), Quota(), Settings()
_HOLDS = {
    "pool create --cpus": _SHAPE.vcpus,
    "pool create --mem": _SHAPE.mem_mib,
    "pool create --cold": "--no-cold",
    "pool create --compression": Compression.ZSTD,
    "pool create --seccomp": SeccompPolicy.BASELINE,
    "pool create --on-exit": OnExit.RESTART,
    "pool create --warm-after": _SLEEP.warm_after_s,
    "pool create --sleep-after": _SLEEP.sleep_after_s,
    "pool create --min-running": _SLEEP.min_running_s,
    "pool create --egress": Egress.NONE,
    "pool create --metadata": "--metadata",
    "instance wake --timeout": 60,
    "tenant create --max-vcpus": _QUOTA.max_vcpus,
    "tenant create --max-mem": _QUOTA.max_mem_mib,
    "tenant create --max-running": _QUOTA.max_running,
    "tenant create --max-warm": _QUOTA.max_warm,
    "tenant create --max-pools": _QUOTA.max_pools,
    "tenant create --max-instances-per-pool": _QUOTA.max_instances_per_pool,
    "tenant create --max-disk": _QUOTA.max_disk_gib,
    "up --driver": _SETTINGS.driver,
    "up --flower-port": _SETTINGS.flower_port,
}


def options(command: click.Command = cli, *path: str) -> Iterator[tuple[str, click.Option]]:
    """Each with the command it belongs to."""
    context = click.Context(command)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from options(found, *path, name)
    yield from ((" ".join(path), param) for param in command.params if isinstance(param, click.Option))


def _may_say_none(path: str, option: click.Option) -> bool:
    name = option.opts[-1]
    plain_flag = option.is_flag and not option.secondary_opts
    return plain_flag or option.required or name in _NONE_GIVEN | _NARROWS or path in _UPDATES


def test_every_option_says_its_default() -> None:
    silent = [
        f"{path} {option.opts[-1]}: {option.help}"
        for path, option in options()
        if not _may_say_none(path, option) and "default: " not in (option.help or "")
    ]
    assert not silent, "\n".join(silent)


def test_every_option_has_a_help_text() -> None:
    assert [f"{path} {option.opts[-1]}" for path, option in options() if not option.help] == []


@pytest.mark.parametrize("name", _HOLDS)
def test_the_default_that_is_said_is_the_one_that_holds(name: str) -> None:
    (option,) = [option for path, option in options() if f"{path} {option.opts[0]}" == name]
    said = re.search(r"default: ([\w-]+)", option.help or "")
    assert said is not None
    assert said[1] == str(_HOLDS[name])


def test_a_default_of_clicks_own_is_the_one_that_is_said() -> None:
    for path, option in options():
        if isinstance(option.default, (int, float, str)) and not option.is_flag:
            assert f"default: {option.default}" in (option.help or ""), f"{path} {option.opts[0]}"


@pytest.mark.parametrize("path", sorted(_UPDATES))
def test_a_command_that_changes_says_that_the_rest_stays(path: str) -> None:
    command: click.Command = cli
    for name in path.split():
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    assert "stays" in (command.help or "")
