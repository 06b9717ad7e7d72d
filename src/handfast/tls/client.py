"""The client's side of a handshake, over memory: enough to look at a server, and to call one."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from OpenSSL import SSL

from handfast.tls.credential import Credential
from handfast.tls.reasons import handshake_failure
from handfast.tls.server import Channel, TlsBroken, write_whole


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server showed in its handshake; nothing in it is verified."""

    chain: tuple[x509.Certificate, ...]
    version: str
    cipher: str
    group: str
    accepted_authorities: tuple[str, ...]  # distinguished names in its CertificateRequest


class ClientHandshake:
    """A handshake that verifies nothing, so that the server can be looked at; the caller judges `facts.chain`."""

    def __init__(self, server_name: str | None, credential: Credential | None = None) -> None:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_verify(SSL.VERIFY_NONE)
        write_whole(context)
        if credential is not None:
            credential.configure(context)
        self._connection = SSL.Connection(context, None)
        if server_name is not None:
            self._connection.set_tlsext_host_name(server_name.encode("idna"))
        self._connection.set_connect_state()

    def feed(self, records: bytes) -> Channel | None:
        """Go on with what the network brought (b'' to begin); None while more is needed. Raises TlsBroken."""
        if records:
            self._connection.bio_write(records)
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return None
        except SSL.Error as error:
            raise TlsBroken(handshake_failure(error)) from None
        return Channel(self._connection)

    def take(self) -> bytes:
        """Return the records that wait to be sent."""
        try:
            return self._connection.bio_read(1 << 16)
        except SSL.WantReadError:
            return b""

    @property
    def facts(self) -> ServerFacts:
        """What the server showed, once `feed` has returned a channel."""
        connection = self._connection
        return ServerFacts(
            chain=tuple(connection.get_peer_cert_chain(as_cryptography=True) or ()),
            version=connection.get_protocol_version_name(),
            cipher=connection.get_cipher_name() or "",
            group=connection.get_group_name() or "",
            accepted_authorities=tuple(
                name.rfc4514_string() for name in connection.get_client_ca_list(as_cryptography=True)
            ),
        )
