"""What an operator sees in Flower: every job under its own name, with what it was asked to do."""

from __future__ import annotations

import html
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.stack import Stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.redis]  # root: Chromium runs without its sandbox

PICTURE = Path(__file__).parents[2] / "build" / "flower.png"
_WINDOW = "--window-size=1500,700"
_PAGE_MS = 10_000  # of the page's own, virtual time
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    f"--virtual-time-budget={_PAGE_MS}", _WINDOW,
)  # fmt: skip


class Browser:
    """Headless Chromium on Flower's pages. The password goes through a file, never through arguments."""

    def __init__(self, stack: Stack, directory: Path) -> None:
        self._address = f"127.0.0.1:{stack.env['MVM_FLOWER_PORT']}"
        self._password = stack.layout.flower_password.read_text().strip()
        self._directory = directory

    def run(self, page: str, *flags: str) -> str:
        """Open `page` and do what `flags` say; returns Chromium's output."""
        start = self._directory / "start.html"
        start.touch(mode=0o600)
        url = f"http://mvm:{self._password}@{self._address}{page}"
        start.write_text(f'<meta http-equiv="refresh" content="0; url={url}">')
        return subprocess.run(
            ["chromium", *_FLAGS, f"--user-data-dir={self._directory / 'profile'}", *flags, start.as_uri()],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip

    def table(self, page: str) -> list[list[str]]:
        """The cells of the page's table as they are shown, once scripts have filled it."""
        rows = re.findall(r"<tr.*?</tr>", self.run(page, "--dump-dom"), re.DOTALL)
        return [[_text(cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL)] for row in rows]


def _text(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", markup)).strip()


def test_flower_shows_every_job_with_its_arguments(fake_stack: Stack, tmp_path: Path) -> None:
    fake_stack.mvm("tenant", "create", "acme", "--max-running", "2")
    fake_stack.mvm("pool", "create", "acme/web", "--flake", "builtin:", "--profile", "minimal", "--mem", "128")
    fake_stack.mvm("pool", "build", "acme/web")
    refs = fake_stack.mvm("instance", "create", "acme/web", "--count", "3").split()
    assert fake_stack.run("instance", "start", *refs).returncode == 5, "the quota lets two run"
    browser = Browser(fake_stack, tmp_path)
    rows: list[dict[str, str]] = []

    def shown() -> bool:
        header, *lines = browser.table("/tasks")
        rows[:] = [dict(zip(header, line, strict=False)) for line in lines]
        starts = [row for row in rows if row.get("Name") == "mvm.instance.start"]
        return sorted(row["State"] for row in starts) == ["FAILURE", "SUCCESS", "SUCCESS"]

    until(shown, 60, "Flower shows the three starts at their end")
    by_name = {row["Name"]: row for row in rows}
    assert {"mvm.tenant.create", "mvm.pool.create", "mvm.pool.build", "mvm.instance.create"} <= set(by_name)
    created = by_name["mvm.tenant.create"]
    assert created["Worker"] == "main@n1"
    assert "'subject': 'acme'" in created["kwargs"]
    assert "'max_running': 2" in created["kwargs"]
    assert "'mem_mib': 128" in by_name["mvm.pool.create"]["kwargs"]
    started = {row["kwargs"].partition("'subject': '")[2].partition("'")[0] for row in rows if "start" in row["Name"]}
    assert started == set(refs)

    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.unlink(missing_ok=True)
    browser.run("/tasks", f"--screenshot={PICTURE}")
    assert PICTURE.read_bytes().startswith(b"\x89PNG")
