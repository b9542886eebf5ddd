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
    assert "running" not in text.split("mvm_jobs_total{", 1)[1].split("}")[0]
