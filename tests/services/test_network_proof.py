"""What guests say of what they reach: late ones are asked again, silent ones prove nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mvm.domain.addressing import TenantNetwork
from mvm.domain.commands import ExecEnd, ExecOutput, ExecPart
from mvm.domain.isolation import calls
from mvm.domain.lifecycle import Status
from mvm.domain.probes import Party, Stand
from mvm.errors import GuestSilent
from mvm.services.network_proof import NetworkProof

REF = "a/web/i-00000001"


class Guest:
    """A guest that answers commands as `answer` says; it is given what was tried, and how often it was asked."""

    def __init__(self, answer: Callable[[list[str], int], list[str]]) -> None:
        self._answer, self.asked = answer, 0

    def run(self, ref: object, directory: Path, command: bytes, *, deadline_s: float) -> Iterator[ExecPart]:
        self.asked += 1
        tried = re.findall(r">\$dir/(\S+)", command.decode())
        yield ExecOutput("\n".join(self._answer(tried, self.asked)).encode())
        yield ExecEnd(0)


class Store:
    def __init__(self, status: Status) -> None:
        self._status = status

    def instance(self, ref: object) -> object:
        return SimpleNamespace(status=self._status)


class Storage:
    def directory(self, ref: object) -> Path:
        return Path("/nowhere")


def party(name: str, net_id: int) -> Party:
    network = TenantNetwork(net_id, IPv4Network(f"10.240.{net_id}.0/24"))
    return Party(name, Stand(network, 2), Stand(network, 9), {f"{name}/web/i-00000001": Stand(network, 3)})


PARTIES = [party("a", 0), party("b", 1)]
ALL = calls(PARTIES)
OWN = [call.word for call in ALL if call.tenant == "a"]


def rows(
    answer: Callable[[list[str], int], list[str]],
    status: Status = Status.RUNNING,
    check: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], int]:
    nothing: Any = None
    store: Any = Store(status)
    guest: Any = Guest(answer)
    storage: Any = Storage()
    proof = NetworkProof(
        store=store, clock=nothing, network=nothing, networks=nothing, probing=None, guest=guest, storage=storage
    )
    return proof._inside(REF, PARTIES[0], ALL, check), guest.asked


def test_one_that_reaches_its_own_and_nobody_else() -> None:
    found, asked = rows(lambda tried, _: [*(word for word in tried if word in OWN), "done"])
    assert asked == 2
    assert all(row["ok"] for row in found)
    assert [row["seen"] for row in found] == ["passes" if call.tenant == "a" else "blocked" for call in ALL]


def test_a_late_answer_is_waited_for() -> None:
    found, asked = rows(lambda tried, turn: [*(word for word in tried[turn == 1 :] if word in OWN), "done"])
    assert asked == 3
    assert all(row["ok"] for row in found)


def test_what_never_answers_is_blocked() -> None:
    found, _ = rows(lambda tried, _: [*(word for word in tried[1:] if word in OWN), "done"])
    assert [row["target"] for row in found if not row["ok"]] == ["a gateway"]


def silent(tried: list[str], turn: int) -> list[str]:
    raise GuestSilent("guest.silent", "it says nothing")


def halfway(tried: list[str], turn: int) -> list[str]:
    return OWN


@pytest.mark.parametrize(("answer", "untried"), [(silent, len(ALL)), (halfway, len(ALL))])
def test_a_guest_that_does_not_say_that_it_is_done_proves_nothing(
    answer: Callable[[list[str], int], list[str]], untried: int
) -> None:
    found, _ = rows(answer)
    assert [row["ok"] for row in found].count(False) == untried
    assert {(row["seen"], bool(row["why"])) for row in found} == {("not tried", True)}


def test_what_it_had_reached_before_it_fell_silent_it_had() -> None:
    found, _ = rows(lambda tried, turn: [*OWN, "done"] if turn == 1 else silent(tried, turn))
    assert [row["seen"] for row in found] == ["passes" if call.tenant == "a" else "not tried" for call in ALL]


def test_a_tenant_that_reaches_another_is_told_though_it_falls_silent() -> None:
    found, _ = rows(lambda tried, turn: [*tried, "done"])
    assert {row["seen"] for row in found} == {"passes"}
    assert [row["ok"] for row in found] == [call.tenant == "a" for call in ALL]


def test_one_that_was_put_to_sleep_meanwhile_is_none_of_those_that_run() -> None:
    assert rows(silent, Status.WARM) == ([], 1)


def test_a_guest_is_not_heard_to_its_end_when_nobody_waits() -> None:
    def gone() -> None:
        raise EOFError

    with pytest.raises(EOFError):
        rows(lambda tried, _: [*tried, "done"], check=gone)
