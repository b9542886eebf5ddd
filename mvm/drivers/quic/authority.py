"""Certificate authorities: read from a file as people have them, and what they issue."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID, ObjectIdentifier

from mvm.drivers.quic.identity import damaged, read

SKEW = timedelta(hours=1)  # a node's clock may be this far behind
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.+?-----END \1-----", re.DOTALL)
_UNVERIFIABLE = (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey, dsa.DSAPrivateKey)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: Any


@dataclass(frozen=True, slots=True)
class Authority:
    """Who issues, the certificates between it and those that are trusted (itself first), and the trusted ones."""

    issuer: Issued
    anchors: tuple[x509.Certificate, ...]
    chain: tuple[x509.Certificate, ...] = ()

    @property
    def not_after(self) -> datetime:
        """When the first certificate of the path ends: nothing that is issued is good for longer."""
        return min(each.not_valid_after_utc for each in (*self.chain, *self.anchors))


def read_authority(path: Path) -> Authority:
    """The CA in a PEM file, which is read once, so that it may be a pipe.

    The file holds the CA's key and its certificate, in any order, and the certificates above it if it is an
    intermediate one. Trusted is the root if it is there, else the highest that is.

    Raises `InvalidInput` (``certs.damaged``), `NotFound` (``certs.missing``), `Forbidden` (``certs.unreadable``).
    """
    certificates, key = _parsed(path, read(path))
    own = [each for each in certificates if each.public_key() == key.public_key()]
    if not own:
        raise damaged(path, "has a key of another certificate")
    if isinstance(key, _UNVERIFIABLE):
        raise damaged(
            path,
            f"has a key of a kind that cannot be used ({type(key).__name__.removesuffix('PrivateKey').lstrip('_')}): "
            "what it signs cannot be verified here; use P-256, P-384, P-521, or RSA of at least 2048 bits",
        )
    upwards = _upwards(own[0], certificates)
    return Authority(Issued(own[0], key), (upwards[-1],), tuple(upwards[:-1]))


def problem_of(authority: Authority) -> str:
    """Why it may not issue, by what its own certificate and those above it say; empty when it may."""
    for each in (*authority.chain, *authority.anchors):
        problem = _ca_problem(each)
        if problem:
            return problem if each is authority.issuer.certificate else f"{each.subject.rfc4514_string()} {problem}"
    if authority.issuer.key.public_key() != authority.issuer.certificate.public_key():
        return "has a key of another certificate"
    return ""


def time_problem(certificate: x509.Certificate, spare_days: float = 0) -> str:
    """Why it is not valid now, or not for `spare_days` more; empty when it is."""
    now = datetime.now(UTC)
    if now < certificate.not_valid_before_utc:
        return "is not valid yet"
    if now + timedelta(days=spare_days) > certificate.not_valid_after_utc:
        return "expires soon" if now <= certificate.not_valid_after_utc else "has expired"
    return ""


def issue(
    issuer: Issued | None,
    common_name: str,
    *,
    sans: Sequence[x509.GeneralName] = (),
    usages: Sequence[ObjectIdentifier] = (),
    days: float,
    not_before: datetime | None = None,
    not_later: datetime | None = None,
) -> Issued:
    """A certificate with a new P-256 key, not valid past `not_later`; without `issuer` it signs itself and is a CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    signer = issuer.key if issuer else key
    subject = _name(common_name)
    start = not_before or datetime.now(UTC) - SKEW
    end = start + timedelta(days=days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(min(end, not_later) if not_later else end)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(_key_usage(ca=issuer is None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_key_id_of(issuer, signer), critical=False)
    )
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    if usages:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return Issued(builder.sign(signer, hashes.SHA256()), key)


def _parsed(path: Path, data: bytes) -> tuple[list[x509.Certificate], Any]:
    certificates: list[x509.Certificate] = []
    keys: list[Any] = []
    for block in _BLOCK.finditer(data):
        kind = block[1].decode()
        try:
            if kind.endswith("CERTIFICATE"):
                certificates.append(x509.load_pem_x509_certificate(block[0]))
            elif kind.endswith("PRIVATE KEY"):
                keys.append(load_pem_private_key(block[0], password=None))
        except (ValueError, TypeError):
            what = "certificate" if kind.endswith("CERTIFICATE") else "unencrypted private key"
            raise damaged(path, f"holds a {kind.lower()} that is no {what}") from None
    if not certificates:
        raise damaged(path, "holds no certificate")
    if len(keys) != 1:
        raise damaged(path, f"holds {len(keys)} private keys" if keys else "holds no unencrypted private key")
    return certificates, keys[0]


def _upwards(lowest: x509.Certificate, among: Sequence[x509.Certificate]) -> list[x509.Certificate]:
    """`lowest` and whoever issued it, and so on, as far as `among` goes."""
    path = [lowest]
    while (above := _issuer_of(path[-1], among)) is not None and above not in path:
        path.append(above)
    return path


def _issuer_of(certificate: x509.Certificate, among: Sequence[x509.Certificate]) -> x509.Certificate | None:
    for each in among:
        if each.subject == certificate.issuer and _signed(certificate, each):
            return each
    return None


def _signed(certificate: x509.Certificate, by: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(by)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _ca_problem(certificate: x509.Certificate) -> str:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (x509.ExtensionNotFound, ValueError):
        return "is not a CA's certificate"
    if not constraints.ca:
        return "is not a CA's certificate"
    return time_problem(certificate)


def _key_id_of(issuer: Issued | None, signer: Any) -> x509.AuthorityKeyIdentifier:
    """The issuer's own name for its key, which need not be the hash that is usual."""
    if issuer is not None:
        try:
            own = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        except (x509.ExtensionNotFound, ValueError):
            pass
        else:
            return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())


def _name(common_name: str) -> x509.Name:
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "mvm")
    return x509.Name([organization, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
