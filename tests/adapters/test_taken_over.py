"""What a VMM that a guest has taken over holds out under a familiar name is not taken for the node's own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mvm.domain.instance import ProcessIdentity
from mvm.domain.secrets import Secrets
from mvm.drivers import processes, secrets_disk
from mvm.drivers.files import closing_fd
from mvm.drivers.instance_sockets import listen
from mvm.drivers.qemu import memory
from mvm.drivers.qemu.qmp import MONITOR, Qmp
from mvm.errors import Failed
from tests.support.make import instance_ref

pytestmark = pytest.mark.root

SECRETS = Secrets(1, datetime(2026, 1, 1, tzinfo=UTC), {"A": "hush"})
FOREIGN = 0x6000_0003
# MFD_ALLOW_SEALING; then F_ADD_SEALS: no more seals, no shrinking, growing, writing.
MAKES = """
import fcntl, os, sys
fd = os.memfd_create(sys.argv[1], 2)
os.truncate(fd, 2 << 20)
fcntl.fcntl(fd, 1033, int(sys.argv[2]))
print("made", flush=True)
sys.stdin.read()
"""


@contextmanager
def vmm(name: str, seals: int, uid: int) -> Iterator[ProcessIdentity]:
    """A process of `uid` with a memfd `name`."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", MAKES, name, str(seals)], user=uid, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        found = processes.identify(process.pid)
        assert found is not None
        yield found
        process.communicate("")


def test_memory_that_a_vmm_made_is_no_templates() -> None:
    for uid, ours in ((0, True), (FOREIGN, False)):
        with vmm("mvm-ram-abc", 15, uid) as process:
            fd = memory.sealed_in(process.pid, "abc")
            assert (fd is not None) is ours
            if fd is not None:
                os.close(fd)


def test_secrets_are_written_to_no_disk_that_a_vmm_made() -> None:
    with vmm(secrets_disk.NAME, 0, 0) as process:
        secrets_disk.replace(process, SECRETS)
    with vmm(secrets_disk.NAME, 0, FOREIGN) as process, pytest.raises(FileNotFoundError):
        secrets_disk.replace(process, SECRETS)


def test_an_image_put_in_the_place_of_the_disk_of_secrets_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    us = processes.identify(os.getpid())
    assert us is not None
    image = tmp_path / "rootfs"
    image.write_bytes(b"image" * 1000)
    with closing_fd(secrets_disk.create(SECRETS)) as disk, closing_fd(os.open(image, os.O_RDONLY)) as rootfs:
        find = secrets_disk._find

        def swapped(pid: int) -> str:
            found = find(pid)
            os.dup2(rootfs, disk)
            return found

        monkeypatch.setattr(secrets_disk, "_find", swapped)
        with pytest.raises(FileNotFoundError):
            secrets_disk.replace(us, SECRETS)
    assert image.read_bytes() == b"image" * 1000


@pytest.mark.parametrize("said", [b'{"event": "X"}\n', b"3\n", b"[" * 100_000 + b"\n", b"x" * 65536])
def test_a_monitor_that_babbles_is_not_heard_for_long(tmp_path: Path, said: bytes) -> None:
    def babble() -> None:
        with listener.accept()[0] as client, suppress(ConnectionError):
            while True:
                client.sendall(said)

    with listen(tmp_path, MONITOR) as listener:
        thread = threading.Thread(target=babble)
        thread.start()
        with pytest.raises(Failed, match="does not speak QMP") as raised, Qmp(instance_ref(), tmp_path, 30) as qmp:
            qmp.run("stop")
        thread.join()
    assert raised.value.code == "vmm.failed"
