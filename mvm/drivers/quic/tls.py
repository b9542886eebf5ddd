"""Mutual TLS for aioquic, which has no interface for it.

aioquic asks for a client's certificate only behind a private flag and then never looks at it, hands out session
tickets that stand in for certificates, and ignores extended key usage. The classes here close these gaps at the
places where aioquic's TLS state machine handles each message; the release is pinned and every refusal has a test.
"""

from __future__ import annotations

import logging
import ssl
from typing import TYPE_CHECKING, Any

from aioquic import tls
from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from mvm.domain.ids import NodeId
from mvm.drivers.quic.frames import ALPN
from mvm.drivers.quic.identity import Credentials, Peer, Refused, verify_client, verify_server

if TYPE_CHECKING:
    from cryptography.x509.verification import Store

# aioquic tells of each connection; what matters of it is an error or a log line of ours.
_logger = logging.getLogger("quic")
_logger.addHandler(logging.NullHandler())
if _logger.level == logging.NOTSET:
    _logger.setLevel(logging.CRITICAL)

IDLE_S = 15.0  # both sides; whoever waits pings more often
CRYPTO_ERROR = 0x100  # a QUIC close code is this plus the TLS alert


class _CertificateRequired(tls.Alert):
    description = tls.AlertDescription.certificate_required


class _ServerTls(tls.Context):
    store: Store
    peer: Peer | None = None

    def _server_handle_certificate(self, input_buf: Buffer) -> None:
        super()._server_handle_certificate(input_buf)
        if self._peer_certificate is None:
            raise _CertificateRequired("a client certificate is required")

    def _server_handle_certificate_verify(self, input_buf: Buffer) -> None:
        super()._server_handle_certificate_verify(input_buf)  # the client has the key
        assert self._peer_certificate is not None
        try:
            self.peer = verify_client(self.store, self._peer_certificate, self._peer_certificate_chain)
        except Refused as refused:
            raise tls.AlertBadCertificate(str(refused)) from refused

    def _server_handle_finished(self, input_buf: Buffer, output_buf: Buffer) -> None:
        # The inherited method installs the key for application data: nobody unverified may come so far.
        if self.peer is None:
            raise _CertificateRequired("a client certificate is required")
        super()._server_handle_finished(input_buf, output_buf)


class _ClientTls(tls.Context):
    store: Store
    peer: Peer | None = None
    meant: NodeId | None = None
    other: Peer | None = None  # a node of ours that answered in place of the one that was meant

    def _client_handle_certificate_verify(self, input_buf: Buffer) -> None:
        super()._client_handle_certificate_verify(input_buf)  # the server has the key
        assert self._peer_certificate is not None
        try:
            peer = verify_server(self.store, self._peer_certificate, self._peer_certificate_chain)
        except Refused as refused:
            raise tls.AlertBadCertificate(str(refused)) from refused
        if self.meant is not None and peer.name != self.meant:
            self.other = peer
            raise tls.AlertBadCertificate(f"the certificate is for {peer}, and node/{self.meant} was meant")
        self.peer = peer

    def _client_handle_finished(self, input_buf: Buffer, output_buf: Buffer) -> None:
        # The inherited method sends our certificate and installs the keys for application data.
        if self.peer is None:
            raise tls.AlertBadCertificate("the server has shown no certificate")
        super()._client_handle_finished(input_buf, output_buf)


class _Verified(QuicConnection):
    """Puts the guards into the TLS context, which aioquic makes itself."""

    context: type[_ServerTls] | type[_ClientTls]
    store: Store
    tls: _ServerTls | _ClientTls

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        self.tls.__class__ = self.context
        self.tls.store = self.store
        self.tls._request_client_certificate = True
        self.tls._supported_groups = [tls.Group.X25519]  # a key for each would be made, twice
        # A ticket would admit its holder without a certificate, and 0-RTT data with it.
        self.tls.get_session_ticket_cb = None
        self.tls.new_session_ticket_cb = None

    @property
    def peer(self) -> Peer | None:
        """The other side, once its certificate has been verified."""
        return self.tls.peer if hasattr(self, "tls") else None


class ServerQuic(_Verified):
    """A server's connection that carries nothing before the client's certificate is verified."""

    context = _ServerTls

    @classmethod
    def adopt(cls, connection: QuicConnection, store: Store) -> ServerQuic:
        """Turn a fresh connection, as aioquic's server makes it, into a guarded one."""
        connection.__class__ = cls
        assert isinstance(connection, cls)
        connection.store = store
        return connection


class ClientQuic(_Verified):
    """A client's connection that sends nothing, not even its certificate, to a server that is not a node.

    With `meant` it is that node and no other.
    """

    context = _ClientTls
    tls: _ClientTls

    def __init__(self, credentials: Credentials, meant: NodeId | None = None) -> None:
        super().__init__(configuration=_configuration(credentials, is_client=True))
        self.store = credentials.store
        self._meant = meant

    @property
    def other(self) -> Peer | None:
        """The node that answered in place of the one that was meant."""
        return self.tls.other if hasattr(self, "tls") else None

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        self.tls.meant = self._meant


def server_configuration(credentials: Credentials) -> QuicConfiguration:
    """For aioquic's server, whose connections `ServerQuic.adopt` takes over."""
    return _configuration(credentials, is_client=False)


def _configuration(credentials: Credentials, *, is_client: bool) -> QuicConfiguration:
    options: dict[str, Any] = {}
    if is_client:
        # A first packet lost costs two or three of these. aioquic's own check of the certificate is off because
        # it knows no key usage; `_ClientTls` verifies.
        options = {"initial_rtt": 0.02, "verify_mode": ssl.CERT_NONE}
    return QuicConfiguration(
        is_client=is_client, alpn_protocols=[ALPN], idle_timeout=IDLE_S, certificate=credentials.certificate,
        certificate_chain=list(credentials.chain), private_key=credentials.key, **options,
    )  # fmt: skip
