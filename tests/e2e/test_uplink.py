"""The way out as the operations guide describes it, done word by word on a host of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mvm.domain.layout import StateLayout
from mvm.drivers.shell import LocalShell
from mvm.drivers.supervisor import Supervisor
from tests.support.local import free_port
from tests.support.microvm import image_cache, lay_in, minimal_image

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]

HOST = """
set -eux
mkdir -p /run/netns
mount -t tmpfs tmpfs /run/netns
ip link set lo up
ip netns add far
ip link add eth0 type veth peer name far0 netns far
ip addr add 192.0.2.1/24 dev eth0
ip link set eth0 up
ip -n far addr add 192.0.2.9/24 dev far0
ip -n far link set far0 up
trap 'mvm down --instances' EXIT
"""
"""A host whose network has one neighbour, which knows no way back to any address but the host's own."""

GUEST = """
mvm tenant create acme
mvm pool create acme/web --flake builtin: --profile minimal --mem 96 --egress nat
mvm pool build acme/web
ref=$(mvm instance create acme/web)
mvm instance start "$ref"
mvm instance exec "$ref" -- ping -c 1 -W 5 192.0.2.9
mvm net verify
"""


@pytest.fixture
def env() -> Iterator[dict[str, str]]:
    root = Path(tempfile.mkdtemp(prefix="mvm-t-"))
    layout = StateLayout(root / "s")
    layout.package_cache.parent.mkdir(parents=True)
    image_cache().package_cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    layout.package_cache.symlink_to(image_cache().package_cache)
    lay_in(layout, minimal_image())
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MVM_")}
    ports = {f"MVM_{name}_PORT": str(free_port()) for name in ("FLOWER", "METRICS", "AGENT")}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}:/usr/sbin:/sbin"
    own = {"MVM_STATE_DIR": str(layout.root), "MVM_NETNS": "mvm", "MVM_NODE_ID": "n1", "PYTHONPATH": str(ROOT)}
    yield {**kept, **ports, **own}
    Supervisor(layout, LocalShell()).stop()
    shutil.rmtree(root, ignore_errors=True)


def recipe() -> str:
    text = (ROOT / "docs" / "operations.md").read_text()
    (block,) = [block for block in re.findall(r"```sh\n(.*?)```", text, re.S) if "MVM_UPLINK=up0 mvm up" in block]
    return block


def test_the_documented_uplink_leads_out(env: dict[str, str]) -> None:
    script = HOST + recipe() + GUEST
    host = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", script]
    done = subprocess.run(host, env=env, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    assert "1 packets received" in done.stdout
    assert "WARNING: acme/web would reach outside" not in done.stderr
