"""What only reads needs no room: a trail is verified on a disk that is full to the last byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

_READER = """
import json, os, sys
from pathlib import Path
from mvm.domain.ids import TenantId
from mvm.errors import MvmError
from tests.services.test_audit_crash import Trails

root = Path(sys.argv[1])
trails = Trails(root)
trails.end_jobs(3)
trails.audit.complete()
trails.end_jobs(2)  # these wait: their place is in the store

with (root / "fill").open("wb", buffering=0) as file:
    for size in (4096, 1):
        try:
            while file.write(bytes(size)):
                pass
        except OSError:
            continue
acme = TenantId("acme")
verdict = trails.audit.verify(acme)
(tail,) = trails.audit.tail(acme, 10, follow=False)
print(json.dumps({"whole": verdict["whole"], "entries": verdict["entries"], "tail": len(tail)}))
"""


def test_a_trail_is_verified_on_a_full_disk(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=2m none {tmp_path} && exec {sys.executable} -c "$0" {tmp_path}'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, _READER],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"whole": True, "entries": 5, "tail": 5}
