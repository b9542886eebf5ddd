"""The certificates of one state directory: trusted CAs, this node's and the coordinator's; replaced as a whole set."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from mvm.domain.ids import NodeId
from mvm.domain.layout import StateLayout
from mvm.drivers.files import former, sync, take_place, write_new
from mvm.drivers.quic.authority import Authority, Issued, issue, problem_of, read_authority, time_problem
from mvm.drivers.quic.identity import (
    COORDINATOR_URI,
    Refused,
    Role,
    damaged,
    load_certificates,
    load_credentials,
    load_key,
    node_dns,
    node_uri,
    store_of,
    verify_client,
    verify_server,
)
from mvm.errors import Failed, MvmError

CA_DAYS = 3650
LEAF_DAYS = 365
RENEW_DAYS = 14  # `init` replaces a certificate that ends sooner
_NAMES = ("ca.key", "ca.pem", "node.key", "node.pem", "coordinator.key", "coordinator.pem")
_WORTH = timedelta(days=1)  # by which a new certificate has to outlive the one it replaces


@dataclass(slots=True)
class _Changes:
    """Files of a set with new contents, or None for those that go; and what the operator should hear."""

    files: dict[str, bytes | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, name: str, key: Any, certificates: Sequence[x509.Certificate]) -> None:
        """A certificate, those above it, and its key, if that is to be here."""
        pem = [each.public_bytes(Encoding.PEM) for each in certificates]
        self.files[f"{name}.pem"] = b"".join(pem)
        private = key and key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.files[f"{name}.key"] = private


def init(layout: StateLayout, node_id: NodeId, ca: Path | None = None) -> tuple[str, ...]:
    """Make what is missing, and leaves anew that are damaged, another node's or about to expire; tells what is amiss.

    A usable set stays as it is, and a CA that is there is never replaced unless `ca` is given: a PEM file (or pipe)
    with a CA's key and certificate, and those above it. It issues, and its key is not kept here.
    A new set is written beside the old one and proven by a handshake before it takes its place, in one step; where the
    file system cannot do that, what a crash left aside is back with the next call.

    Raises `InvalidInput` (``certs.damaged``) for an unusable CA, and `Failed`: ``certs.no_ca_key`` when a
    certificate is needed and only the CA's own is here, ``certs.unusable`` when a new set does not work,
    ``certs.unwritable`` when the directory cannot be written. Nothing has changed then.
    """
    given = None if ca is None else _given(ca)
    with _locked(layout.certs) as directory:
        _put_leftovers_away(directory)
        changes = _changes(directory, node_id, given)
        if changes.files:
            _replace(directory, changes.files, node_id, ca)
    return tuple(changes.notes)


def status(layout: StateLayout, node_id: NodeId | None = None) -> list[dict[str, Any]]:
    """Per certificate: ``name, path, subject, sans, not_after, days_left, ok, problem``. Never raises.

    With `node_id` the node's certificate must be that node's.
    """
    rows = []
    for name in ("ca", Role.NODE, Role.COORDINATOR):
        path = layout.certs / f"{name}.pem"
        row: dict[str, Any] = {
            "name": str(name), "path": str(path), "subject": "", "sans": [], "not_after": None, "days_left": None,
        }  # fmt: skip
        with suppress(MvmError):  # the same error is the row's problem
            row |= _describe(load_certificates(path)[0])
        problem = _ca_problem(layout.certs) if name == "ca" else _leaf_problem(layout.certs, Role(name), node_id)
        rows.append(row | {"ok": not problem, "problem": problem})
    return rows


def _given(path: Path) -> Authority:
    authority = read_authority(path)
    problem = problem_of(authority)
    if problem:
        raise damaged(path, problem)
    return authority


def _changes(directory: Path, node_id: NodeId, given: Authority | None) -> _Changes:
    """What has to change for a usable set; with `given`, for one that trusts it."""
    changes = _Changes()
    authority = _authority(directory, given, changes)
    trusts_another = "ca.pem" in changes.files
    for role in (Role.NODE, Role.COORDINATOR):
        problem = _leaf_problem(directory, role, node_id)
        if problem or trusts_another:
            if authority is None:
                raise _no_ca_key(directory, role)
            _issue_leaf(changes, authority, role, node_id)
        elif _leaf_problem(directory, role, node_id, spare_days=RENEW_DAYS):
            _renew(changes, directory, authority, role, node_id)
    return changes


def _renew(changes: _Changes, directory: Path, authority: Authority | None, role: Role, node_id: NodeId) -> None:
    """A leaf that is good and ends soon: anew if that makes it last longer."""
    end = load_certificates(directory / f"{role}.pem")[0].not_valid_after_utc
    if authority is None:
        changes.notes.append(
            f"{role}.pem ends on {end:%Y-%m-%d} and the CA's key is not here: mvm agent certs init --ca FILE"
        )
    elif authority.not_after < end + _WORTH:
        changes.notes.append(f"{role}.pem ends on {end:%Y-%m-%d} with its CA: mvm agent certs init --ca FILE")
    else:
        _issue_leaf(changes, authority, role, node_id)


def _issue_leaf(changes: _Changes, authority: Authority, role: Role, node_id: NodeId) -> None:
    issued = _leaf(authority, role, node_id)
    changes.put(role, issued.key, [issued.certificate, *authority.chain])


def _leaf(authority: Authority, role: Role, node_id: NodeId) -> Issued:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(COORDINATOR_URI)]
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role is Role.NODE:
        names = [x509.DNSName(node_dns(node_id)), x509.UniformResourceIdentifier(node_uri(node_id))]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    common_name = node_id if role is Role.NODE else "coordinator"
    return issue(
        authority.issuer, common_name, sans=names, usages=usages, days=LEAF_DAYS, not_later=authority.not_after
    )


def _authority(directory: Path, given: Authority | None, changes: _Changes) -> Authority | None:
    """The CA that issues, noted in `changes` when it is new here; None when only its certificate is here."""
    certificate, key = directory / "ca.pem", directory / "ca.key"
    if given is not None:
        if _ca_problem(directory) or not set(given.anchors) <= set(load_certificates(certificate)):
            changes.put("ca", None, given.anchors)
        return given
    if not certificate.exists():
        made = issue(None, f"CA {secrets.token_hex(4)}", days=CA_DAYS)
        changes.put("ca", made.key, [made.certificate])
        return Authority(made, (made.certificate,))
    if key.exists():
        key.chmod(0o600)
    problem = _ca_problem(directory)
    if problem:  # others may trust this CA: it is not replaced behind their backs
        raise damaged(certificate, problem)
    return _own(directory) if key.exists() else None


def _own(directory: Path) -> Authority:
    certificate = load_certificates(directory / "ca.pem")[0]
    return Authority(Issued(certificate, load_key(directory / "ca.key")), (certificate,))


def _no_ca_key(directory: Path, role: Role) -> Failed:
    return Failed(
        "certs.no_ca_key",
        f"{directory}/{role}.pem must be made and the CA's key is not here",
        hint="give the CA's certificate and key: mvm agent certs init --ca FILE",
        path=str(directory),
    )


def _ca_problem(directory: Path) -> str:
    """Why the CA cannot be used, or an empty string; its key may be elsewhere."""
    try:
        key = directory / "ca.key"
        if not key.exists():
            return time_problem(load_certificates(directory / "ca.pem")[0])
        return _mode_problem(key) or problem_of(_own(directory))
    except MvmError as error:
        return error.message


def _leaf_problem(directory: Path, role: Role, node_id: NodeId | None, *, spare_days: float = 0) -> str:
    """Why the node's or coordinator's certificate cannot be used, or an empty string."""
    try:
        store = store_of(load_certificates(directory / "ca.pem"))
        leaf, *chain = load_certificates(directory / f"{role}.pem")
        key_path = directory / f"{role}.key"
        if load_key(key_path).public_key() != leaf.public_key():
            return f"{key_path} is the key of another certificate"
        peer = verify_client(store, leaf, chain)
        if role is Role.NODE:
            verify_server(store, leaf, chain)
    except MvmError as error:
        return error.message
    except Refused as refused:
        return str(refused)
    if peer.role is not role or (node_id is not None and role is Role.NODE and peer.name != node_id):
        return f"the certificate is for {peer}"
    return _mode_problem(key_path) or time_problem(leaf, spare_days)


def _mode_problem(key: Path) -> str:
    return f"{key} can be read by others" if key.stat().st_mode & 0o077 else ""


def _describe(certificate: x509.Certificate) -> dict[str, Any]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        sans = [str(name.value) for name in names]
    except (x509.ExtensionNotFound, ValueError):
        sans = []
    end = certificate.not_valid_after_utc
    return {
        "subject": certificate.subject.rfc4514_string(),
        "sans": sans,
        "not_after": end.isoformat(),
        "days_left": (end - datetime.now(UTC)).days,
    }


@contextmanager
def _locked(certs: Path) -> Iterator[Path]:
    """The directory, links followed, 0700, with nobody else at it; what the system refuses becomes `Failed`.

    The lock is on the directory above, since this one is replaced.
    """
    try:
        directory = certs.resolve()
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.exists() and former(directory).exists():  # a crash left neither set in its place
                former(directory).rename(directory)
            directory.mkdir(mode=0o700, exist_ok=True)
            directory.chmod(0o700)
            yield directory
        finally:
            os.close(lock)
    except OSError as error:
        raise Failed(
            "certs.unwritable",
            f"{error.filename or certs}: {error.strerror}",
            hint="run as the user that owns the state directory; it must not be a mount of its own",
            path=str(certs),
        ) from None


def _replace(directory: Path, files: Mapping[str, bytes | None], node_id: NodeId, ca: Path | None) -> None:
    """The set with `files` in it, whole and proven, in place of the one that is there; or an error and nothing."""
    draft = directory.with_name(f"{_draft_prefix(directory)}{secrets.token_hex(4)}")
    draft.mkdir(mode=0o700)
    try:
        for name in _NAMES:
            content = files[name] if name in files else _kept(directory / name)
            if content is not None:
                write_new(draft / name, content)
        sync(draft)
        _prove(draft, node_id, ca)
        take_place(draft, directory)
        sync(directory.parent)
    finally:
        if draft.exists():
            _put_away(draft, directory)


def _prove(draft: Path, node_id: NodeId, ca: Path | None) -> None:
    """Raises unless the set in `draft` does what it is for: a handshake in which each side accepts the other."""
    from mvm.drivers.quic.rehearsal import rehearse

    problem = _leaf_problem(draft, Role.NODE, node_id) or _leaf_problem(draft, Role.COORDINATOR, node_id)
    if not problem:
        try:
            rehearse(load_credentials(draft, Role.NODE), load_credentials(draft, Role.COORDINATOR), node_id)
        except Refused as refused:
            problem = str(refused)
    if problem and ca is not None:
        raise damaged(ca, f"issues certificates that cannot be used: {problem}")
    if problem:
        raise Failed("certs.unusable", f"the new certificates do not work: {problem}", hint="nothing was changed")


def _draft_prefix(directory: Path) -> str:
    return f".{directory.name}."


def _put_leftovers_away(directory: Path) -> None:
    """What a crash left: a set that was not finished, or the one before."""
    for left in directory.parent.glob(f"{_draft_prefix(directory)}*"):
        _put_away(left, directory)
    if former(directory).exists():
        _put_away(former(directory), directory)


def _put_away(unused: Path, directory: Path) -> None:
    """Remove a set that is not in use; files in it that are not ours move to the one that is."""
    for path in unused.iterdir():
        if path.name not in _NAMES:
            path.rename(directory / path.name)
    shutil.rmtree(unused)


def _kept(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
