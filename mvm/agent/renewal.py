"""The agent's certificates as they are now: a set that takes another's place is used from then on."""

from __future__ import annotations

from pathlib import Path

import structlog

from mvm.drivers.quic.identity import Credentials, Refused, load_credentials, verify_server
from mvm.errors import Failed, MvmError

log = structlog.get_logger(__name__)


class Renewal:
    """The node's certificate, key and CAs in a directory, which is replaced as a whole (`mvm.drivers.quic.certs`).

    Raises what `load_credentials` raises, and `Failed` (``agent.bad_certificate``) when clients would refuse it.
    """

    def __init__(self, certs_dir: Path) -> None:
        self._directory = certs_dir
        self._seen = self._mark()
        self.credentials = load_credentials(certs_dir, "node")
        self.node = own_name(self.credentials)

    def renewed(self) -> bool:
        """Whether there are others than before, which are `credentials` now. Those that are not good are not taken."""
        mark = self._mark()
        if mark == self._seen:
            return False
        self._seen = mark
        try:
            credentials = load_credentials(self._directory, "node")
            node = own_name(credentials)
            if node != self.node:
                raise Failed("agent.bad_certificate", f"it is for node {node}, and this agent is node {self.node}")
        except MvmError as error:
            log.error("agent.certificates_not_taken", code=error.code, error=error.message)
            return False
        self.credentials = credentials
        log.info("agent.certificates_renewed")
        return True

    def _mark(self) -> tuple[int, int]:
        try:
            there = self._directory.stat()
        except OSError:
            return 0, 0
        return there.st_ino, there.st_mtime_ns


def own_name(credentials: Credentials) -> str:
    """The node that a certificate makes of its holder; raises `Failed` (``agent.bad_certificate``)."""
    assert credentials.certificate is not None
    try:
        return verify_server(credentials.store, credentials.certificate, credentials.chain).name
    except Refused as refused:
        raise Failed(
            "agent.bad_certificate",
            f"this node's certificate cannot be used: {refused}",
            hint="see: mvm agent certs status; make another one: mvm agent certs init",
        ) from None
