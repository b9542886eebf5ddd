"""The endpoint shows what several processes counted."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

from mvm.domain.job import JobState
from tests.support.make import job

COUNT = """
from datetime import timedelta
from mvm.telemetry import metrics
from mvm.domain.job import JobState
from tests.support.make import START, job
metrics.observe_job(job(state=JobState.RUNNING))
done = job(state=JobState.SUCCEEDED, started_at=START, finished_at=START + timedelta(seconds=2))
metrics.observe_job(done)
metrics.INSTANCES.labels("running").set(3)
from mvm.domain.findings import DiskResult, HealthResult, Ill, StalePid, StalePidResult
from mvm.domain.findings import Missing, OrphanFound, OrphanResult
from mvm.domain.job import JobVerb
left, gone = OrphanFound("tap", "tap tn1i3", 5.0), OrphanFound("tap", "tap tn1i4", 60.0, removed=True)
for verb, result in {
    JobVerb.SWEEP_ORPHANS: OrphanResult([left, gone], [Missing("tap", "tap tn1i5", None, "")], ["j"], []),
    JobVerb.SWEEP_STALE_PIDS: StalePidResult([StalePid("a/b/i-1", "gone")]),
    JobVerb.SWEEP_HEALTH: HealthResult(4, [Ill("a/b/i-2", 6, True, "silent"), Ill("a/b/i-3", 1, False, "silent")]),
    JobVerb.SWEEP_DISK: DiskResult(free=1000, kinds={"revisions": 70}),
}.items():
    metrics.observe_job(job(state=JobState.SUCCEEDED, verb=verb, result=result.to_dict()))
"""
SERVE = """
import sys
from mvm.telemetry import metrics
import socket
sock = socket.create_server(("127.0.0.1", 0))
stop = metrics.serve([sock])
print(sock.getsockname()[1], flush=True)
sys.stdin.read()
stop()
"""


def test_samples_of_all_processes_are_summed(tmp_path: Path) -> None:
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", COUNT], env=env, check=True)
    with subprocess.Popen(
        [sys.executable, "-c", SERVE], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            text = response.read().decode()
        server.communicate("")
    assert server.returncode == 0
    verb = job(state=JobState.SUCCEEDED).verb.value
    assert f'mvm_jobs_total{{state="succeeded",verb="{verb}"}} 2.0' in text
    assert f'mvm_job_seconds_sum{{verb="{verb}"}} 4.0' in text
    assert 'mvm_instances{status="running"} 3.0' in text
    for line in (
        'mvm_sweep_findings_total{finding="removed",sweep="sweep.orphans"} 2.0',
        'mvm_sweep_findings_total{finding="sent_again",sweep="sweep.orphans"} 2.0',
        'mvm_sweep_findings_total{finding="stopped",sweep="sweep.stale_pids"} 2.0',
        'mvm_orphans{kind="tap"} 1.0', 'mvm_orphans{kind="bridge"} 0.0', "mvm_missing 1.0", "mvm_ill_guests 1.0",
        "mvm_disk_free_bytes 1000.0", 'mvm_disk_used_bytes{kind="revisions"} 70.0',
    ):  # fmt: skip
        assert line in text
    assert "running" not in text.split("mvm_jobs_total{", 1)[1].split("}")[0]
