"""The certificates of one state directory: a CA, this node's and the coordinator's, all P-256."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from cryptography.x509.verification import Store

from mvm.domain.ids import NodeId
from mvm.domain.layout import StateLayout
from mvm.drivers.quic.identity import (
    COORDINATOR_URI,
    Refused,
    Role,
    damaged,
    load_certificates,
    load_key,
    node_dns,
    node_uri,
    verify_client,
    verify_server,
)
from mvm.errors import Failed, MvmError

CA_DAYS = 3650
LEAF_DAYS = 365
RENEW_DAYS = 14  # `init` replaces a certificate that ends sooner
_SKEW = timedelta(hours=1)  # a node's clock may be this far behind
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: Any


def init(layout: StateLayout, node_id: NodeId, ca: Path | None = None) -> None:
    """Make what is missing, and leaves anew that are damaged, another node's or about to expire.

    A usable set stays as it is, and a CA that is there is never replaced unless `ca` is given.
    `ca` is a PEM file with a CA certificate and its key, which then issues; what another CA issued is replaced.

    Raises `InvalidInput` (``certs.damaged``) for an unusable CA, and `Failed`: ``certs.no_ca_key`` when a
    certificate is needed and only the CA's own is here, ``certs.unwritable`` when the directory cannot be written.
    """
    directory = layout.certs
    with _locked(directory):
        authority = _authority(directory, ca)
        for name in (Role.NODE, Role.COORDINATOR):
            if not _leaf_problem(directory, name, node_id, spare_days=RENEW_DAYS):
                continue
            if authority is None:
                raise Failed(
                    "certs.no_ca_key", f"{directory}/{name}.pem must be made and the CA's key is not here",
                    hint="give the CA's certificate and key: mvm agent certs init --ca FILE", path=str(directory),
                )  # fmt: skip
            _write_pair(directory, name, _leaf(authority, name, node_id))


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


def issue(
    issuer: Issued | None,
    common_name: str,
    *,
    sans: Sequence[x509.GeneralName] = (),
    usages: Sequence[ObjectIdentifier] = (),
    days: float,
    not_before: datetime | None = None,
) -> Issued:
    """A certificate with a new key; without `issuer` it signs itself and is a CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    signer = issuer.key if issuer else key
    subject = _name(common_name)
    start = not_before or datetime.now(UTC) - _SKEW
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(_key_usage(ca=issuer is None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return Issued(builder.sign(signer, hashes.SHA256()), key)


def _leaf(authority: Issued, role: Role, node_id: NodeId) -> Issued:
    if role is Role.COORDINATOR:
        uri = x509.UniformResourceIdentifier(COORDINATOR_URI)
        return issue(authority, "coordinator", sans=[uri], usages=[CLIENT], days=LEAF_DAYS)
    names = [x509.DNSName(node_dns(node_id)), x509.UniformResourceIdentifier(node_uri(node_id))]
    return issue(authority, node_id, sans=names, usages=[SERVER, CLIENT], days=LEAF_DAYS)


def _authority(directory: Path, bundle: Path | None) -> Issued | None:
    """The CA that issues, written down; None when only its certificate is here."""
    if bundle is not None:
        given = Issued(load_certificates(bundle)[0], load_key(bundle))
        problem = _issuer_problem(given)
        if problem:
            raise damaged(bundle, problem)
        if _ca_problem(directory) or load_certificates(directory / "ca.pem")[0] != given.certificate:
            _write_pair(directory, "ca", given)
        return given
    certificate, key = directory / "ca.pem", directory / "ca.key"
    if not certificate.exists():
        made = issue(None, f"CA {secrets.token_hex(4)}", days=CA_DAYS)
        _write_pair(directory, "ca", made)
        return made
    if key.exists():
        key.chmod(0o600)
    problem = _ca_problem(directory)
    if problem:  # others may trust this CA: it is not replaced behind their backs
        raise damaged(certificate, problem)
    return Issued(load_certificates(certificate)[0], load_key(key)) if key.exists() else None


def _ca_problem(directory: Path) -> str:
    """Why the CA cannot be used, or an empty string; its key may be elsewhere."""
    try:
        certificate, path = load_certificates(directory / "ca.pem")[0], directory / "ca.key"
        if not path.exists():
            return _time_problem(certificate)
        return _mode_problem(path) or _issuer_problem(Issued(certificate, load_key(path)))
    except MvmError as error:
        return error.message


def _issuer_problem(authority: Issued) -> str:
    try:
        constraints = authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, ValueError):
        return "is not a CA's certificate"
    if not constraints.ca:
        return "is not a CA's certificate"
    if authority.key.public_key() != authority.certificate.public_key():
        return "has a key of another certificate"
    return _time_problem(authority.certificate)


def _leaf_problem(directory: Path, role: Role, node_id: NodeId | None, *, spare_days: float = 0) -> str:
    """Why the node's or coordinator's certificate cannot be used, or an empty string."""
    try:
        store = Store(list(load_certificates(directory / "ca.pem")))
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
    return _mode_problem(key_path) or _time_problem(leaf, spare_days)


def _mode_problem(key: Path) -> str:
    return f"{key} can be read by others" if key.stat().st_mode & 0o077 else ""


def _time_problem(certificate: x509.Certificate, spare_days: float = 0) -> str:
    now = datetime.now(UTC)
    if now < certificate.not_valid_before_utc:
        return "is not valid yet"
    if now + timedelta(days=spare_days) > certificate.not_valid_after_utc:
        return "expires soon" if now <= certificate.not_valid_after_utc else "has expired"
    return ""


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


def _name(common_name: str) -> x509.Name:
    return x509.Name([
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "mvm"),
        x509.NameAttribute(NameOID.COMMON_NAME, common_name),
    ])  # fmt: skip


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The directory, 0700, with nobody else writing in it; what the system refuses becomes `Failed`."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
    except OSError as error:
        raise Failed(
            "certs.unwritable", f"{error.filename or directory}: {error.strerror}",
            hint="run as the user that owns the state directory", path=str(directory),
        ) from None  # fmt: skip


def _write_pair(directory: Path, name: str, issued: Issued) -> None:
    # A crash between the two leaves a key of another certificate, which `init` sees and replaces.
    key = issued.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _write(directory / f"{name}.key", key)
    _write(directory / f"{name}.pem", issued.certificate.public_bytes(Encoding.PEM))


def _write(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
