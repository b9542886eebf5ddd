"""Each line of the rules is there for a reason that traffic shows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mvm.errors import Failed
from tests.support.apart import Trial, apart
from tests.support.flows import FLOWS, tracked

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

POLICIES = (
    {"policy": "nat"},
    {"policy": "allow", "allow": ["192.0.2.0/24:443/tcp", "203.0.113.5"]},
    {"policy": "none"},
)
LONG_S = 2.0  # for what should not pass to show that it does
BRIDGE_NETFILTER = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
AT_ONCE = 4  # nodes, for most of it is waiting
TABLE = Path(__file__).parents[2] / "build" / "mutation-table.txt"


def reason(trial: Trial, lines: list[str], patience_s: float = 2.0, settle_s: float = 0.3) -> str:
    """What goes wrong with `lines`; empty if nothing does."""
    text = "\n".join(lines) + "\n"
    try:
        trial.node.packets.remove()
        trial.node.nft(text)
    except Failed:
        return "nft refuses the rest, and nothing changes"
    wrong = [row for row in (*trial.rows(patience_s=patience_s, settle_s=settle_s), *tracked(trial)) if not row["ok"]]
    if wrong:
        first = wrong[0]
        return (
            f"{first['kind']}: {first['source']} to {first['target']} {first['seen']} ({len(wrong)} probes)"
        )  # fmt: skip
    before = trial.node.packets.differences(trial.rules)
    trial.node.nft(text)
    return "" if trial.node.packets.differences(trial.rules) == before else "applied again, it adds up"


def table(directory: Path, turn: int) -> dict[int, tuple[str, str]]:
    """Every `AT_ONCE`th line and why it is there, found on a node of its own."""
    directory.mkdir()
    with apart(directory, host_ports="8443", never="198.18.0.0/15", flows=FLOWS, bridge_netfilter=True) as node:
        node.tenants(3, POLICIES)
        with node.trial() as trial:
            lines = trial.rules.commands()
            assert reason(trial, lines, 30) == "", "all lines: nothing is wrong"
            found = {n: (lines[n], reason(trial, lines[:n] + lines[n + 1 :])) for n in range(turn, len(lines), AT_ONCE)}
            BRIDGE_NETFILTER.write_text("0")
            assert reason(trial, lines, 30) == "", "all lines: nothing is wrong in a namespace of ours"
            for n in [n for n, (_, why) in found.items() if not why]:  # needed there alone, or what passed was late
                found[n] = (lines[n], reason(trial, lines[:n] + lines[n + 1 :], settle_s=LONG_S))
            node.packets.apply(trial.rules)
    return found


def test_without_any_line_a_probe_fails(tmp_path: Path) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts = list(pool.map(lambda turn: table(tmp_path / str(turn), turn), range(AT_ONCE)))
    found = [row for _, row in sorted(row for part in parts for row in part.items())]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("".join(f"{line}\n    {why or 'NOTHING'}\n" for line, why in found))
    assert [line for line, why in found if not why] == [], "a line that nothing needs is to go"
