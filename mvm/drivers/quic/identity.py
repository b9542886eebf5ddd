"""Who a verified certificate names.

Both directions demand a chain to our CA, the extended key usage *present* (the verifier takes its absence for
consent), and exactly one name under ``spiffe://mvm/``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier
from cryptography.x509.verification import Criticality, ExtensionPolicy, Policy, PolicyBuilder, Store

from mvm.domain.ids import NodeId
from mvm.errors import Forbidden, InvalidInput, NotFound

COORDINATOR_URI = "spiffe://mvm/coordinator"
_NODE_URI = "spiffe://mvm/node/"


class Role(StrEnum):
    """What a certificate entitles its holder to be."""

    COORDINATOR = "coordinator"
    NODE = "node"


@dataclass(frozen=True, slots=True)
class Peer:
    """The holder of a verified certificate; `name` is a node's id and empty for the coordinator."""

    role: Role
    name: str
    not_after: datetime

    def __str__(self) -> str:
        return f"{self.role}/{self.name}" if self.name else str(self.role)


class Refused(Exception):
    """The certificate is not one of ours, or not for this use; the message says why."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """One side's certificate and key, and the CA certificates it trusts. Without a certificate: anonymous."""

    authorities: tuple[x509.Certificate, ...]
    certificate: x509.Certificate | None = None
    chain: tuple[x509.Certificate, ...] = ()
    key: Any = None

    @property
    def store(self) -> Store:
        """The trusted CA certificates, as the verifier wants them."""
        return store_of(self.authorities)


def node_uri(node_id: NodeId) -> str:
    """The URI in a node's certificate."""
    return _NODE_URI + node_id


def node_dns(node_id: NodeId) -> str:
    """The DNS name in a node's certificate; no resolver ever sees it."""
    return f"{node_id}.node.mvm"


def store_of(authorities: Sequence[x509.Certificate]) -> Store:
    """Trusted CA certificates, as the verifier wants them."""
    return Store(list(authorities))


def verify_client(store: Store, leaf: x509.Certificate, chain: Sequence[x509.Certificate]) -> Peer:
    """Who calls. Raises `Refused`."""
    try:
        _policy(store).build_client_verifier().verify(leaf, list(chain))
        return _peer(leaf, ExtendedKeyUsageOID.CLIENT_AUTH)
    except Refused:
        raise
    except Exception as error:  # whatever is odd about a stranger's certificate, the answer is no
        raise Refused(_why(error)) from error


def verify_server(store: Store, leaf: x509.Certificate, chain: Sequence[x509.Certificate]) -> Peer:
    """Which node answers. Raises `Refused` for anything but a node."""
    try:
        peer = _peer(leaf, ExtendedKeyUsageOID.SERVER_AUTH)
        if peer.role is not Role.NODE:
            raise Refused("the certificate is not a node's")
        name = x509.DNSName(node_dns(NodeId(peer.name)))
        _policy(store).build_server_verifier(name).verify(leaf, list(chain))
        return peer
    except Refused:
        raise
    except Exception as error:  # as above
        raise Refused(_why(error)) from error


def _policy(store: Store) -> PolicyBuilder:
    """What RFC 5280 asks of CAs, not what browsers ask of them: no key usage is as good as one for signing.

    The verifier itself still wants keys and signatures that it knows, and in a CA's extended key usage, if there
    is one, the use in question.
    """
    authorities = (
        ExtensionPolicy.webpki_defaults_ca()
        .may_be_present(x509.KeyUsage, Criticality.AGNOSTIC, _check_usage)
        .require_present(x509.BasicConstraints, Criticality.AGNOSTIC, _check_ca)
    )
    return PolicyBuilder().store(store).extension_policies(
        ca_policy=authorities, ee_policy=ExtensionPolicy.webpki_defaults_ee()
    )  # fmt: skip


def _check_usage(_policy: Policy, _certificate: x509.Certificate, usage: x509.KeyUsage | None) -> None:
    if usage is not None and not usage.key_cert_sign:
        raise ValueError("a CA's certificate is not for signing certificates")


def _check_ca(_policy: Policy, _certificate: x509.Certificate, constraints: x509.BasicConstraints) -> None:
    if not constraints.ca:
        raise ValueError("the certificate of an issuer is no CA's")


def load_credentials(directory: Path, name: str) -> Credentials:
    """``ca.pem``, ``NAME.pem`` and ``NAME.key``.

    Raises `NotFound` (``certs.missing``), `Forbidden` (``certs.unreadable``) and `InvalidInput` (``certs.damaged``).
    """
    with _opened(directory) as fd:  # one set, even if another takes its place meanwhile
        authorities = _certificates(directory / "ca.pem", fd)
        certificate, *chain = _certificates(directory / f"{name}.pem", fd)
        key = _key(directory / f"{name}.key", fd)
    return Credentials(authorities, certificate, tuple(chain), key)


def load_certificates(path: Path) -> tuple[x509.Certificate, ...]:
    """At least one certificate; errors as `load_credentials`."""
    return _certificates(path)


def load_key(path: Path) -> Any:
    """An unencrypted private key; errors as `load_credentials`."""
    return _key(path)


def read(path: Path, directory: int | None = None) -> bytes:
    """The file's bytes, by its name in an open `directory` if there is one; errors as `load_credentials`."""
    try:
        with open(path if directory is None else path.name, "rb", opener=partial(os.open, dir_fd=directory)) as file:
            return file.read()
    except OSError as error:
        raise _unreadable(path, error) from None


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(directory, error) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _certificates(path: Path, directory: int | None = None) -> tuple[x509.Certificate, ...]:
    data = read(path, directory)
    try:
        return tuple(x509.load_pem_x509_certificates(data))
    except ValueError:
        raise damaged(path, "holds no certificate") from None


def _key(path: Path, directory: int | None = None) -> Any:
    data = read(path, directory)
    try:
        return load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        raise damaged(path, "holds no unencrypted private key") from None


def _unreadable(path: Path, error: OSError) -> NotFound | Forbidden:
    if isinstance(error, FileNotFoundError):
        return NotFound("certs.missing", f"{path} does not exist", hint="run: mvm agent certs init", path=str(path))
    return Forbidden(
        "certs.unreadable",
        f"{path}: {os.strerror(error.errno or 0)}",
        hint="run as the user that owns the state directory",
        path=str(path),
    )


def damaged(path: Path, why: str) -> InvalidInput:
    """The error for a file that is not what it should be."""
    return InvalidInput("certs.damaged", f"{path} {why}", hint="see: mvm agent certs status", path=str(path))


def _peer(leaf: x509.Certificate, usage: ObjectIdentifier) -> Peer:
    try:
        allowed = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as missing:
        raise Refused(f"the certificate lacks the extension {missing.oid._name}") from None
    if usage not in allowed:
        raise Refused(f"the certificate is not for {usage._name}")
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise Refused("the certificate does not have exactly one URI name")
    if uris[0] == COORDINATOR_URI:
        return Peer(Role.COORDINATOR, "", leaf.not_valid_after_utc)
    if uris[0].startswith(_NODE_URI):
        try:
            return Peer(Role.NODE, NodeId(uris[0].removeprefix(_NODE_URI)), leaf.not_valid_after_utc)
        except InvalidInput:
            pass
    raise Refused("the certificate names neither the coordinator nor a node")


def _why(error: Exception) -> str:
    return f"the certificate does not verify: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
