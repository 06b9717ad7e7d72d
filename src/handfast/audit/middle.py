"""The person in the middle: we stand between a client and its server, with a certificate that we made ourselves.

Here the client is put to the test. It runs on this machine and is told to reach the server's name at our port; a
right one ends the handshake. What counts is whether it sends us anything of its request.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography.hazmat.primitives.serialization import Encoding
from tlslite.api import HandshakeSettings, TLSConnection, parsePEMKey
from tlslite.errors import TLSAbruptCloseError, TLSError, TLSRemoteAlert

from handfast.audit.model import Check, Evidence, Need, Outcome, Remedies, Severity, failed, passed, unclear
from handfast.audit.odd import chain_of
from handfast.audit.oracle import worst
from handfast.audit.runner import Audit, Client
from handfast.audit.wires import MAX_REPLY
from handfast.files import read_file
from handfast.pki.certificates import parse_certificates
from handfast.pki.names import printable
from handfast.testing import SERVER, Spec, TestAuthority, TestLeaf, make
from handfast.wire.alerts import alert_name

_FINISHED = "it finished the handshake"
_MOST_IMPOSTORS = 2
_CLIENT_TIME = 10.0  # seconds for a client to begin, and to be done
_PYTHON = """
import socket, ssl, sys
host, port, ca = sys.argv[1], int(sys.argv[2]), sys.argv[3]
context = ssl.create_default_context(cafile=ca)
with socket.create_connection(("127.0.0.1", port), timeout=8) as plain:
    with context.wrap_socket(plain, server_hostname=host) as tls:
        tls.sendall(b"GET / HTTP/1.1\\r\\nHost: " + host.encode() + b"\\r\\nConnection: close\\r\\n\\r\\n")
        tls.recv(1)
"""


def curl(host: str, port: int, ca: str, _folder: Path) -> list[str]:
    """curl, as an operator calls it."""
    there = f"{host}:443:127.0.0.1:{port}"
    return [
        "curl",
        "-sS",
        "--max-time",
        "8",
        "--noproxy",
        "*",
        "--cacert",
        ca,
        "--connect-to",
        there,
        f"https://{host}/",
    ]


def python(host: str, port: int, ca: str, _folder: Path) -> list[str]:
    """Python's ssl with its default context, which requests, urllib3 and httpx use as well."""
    return [sys.executable, "-c", _PYTHON, host, str(port), ca]


def openssl(host: str, port: int, ca: str, _folder: Path) -> list[str]:
    """`openssl s_client` told to verify, which it does not by itself."""
    words = ["-CAfile", ca, "-verify_return_error", "-verify_hostname", host, "-servername", host]
    return ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", *words]


def connector(host: str, port: int, ca: str, folder: Path) -> list[str]:
    """`handfast connect`, which shakes hands with the server before it listens. Its certificate is nobody's."""
    cert, key = TestAuthority.root().client().save(folder, "client")
    ours = ["--cert", str(cert), "--key", str(key), "--ca", ca, "--listen", "127.0.0.1:0"]
    return [sys.executable, "-m", "handfast", "connect", "--to", f"127.0.0.1:{port}", "--sni", host, *ours]


CLIENTS = {"curl": curl, "python": python, "openssl": openssl, "handfast": connector}


def _middle(audit: Audit) -> Outcome:
    client = audit.means.client
    assert client is not None  # it is needed
    tries = []
    for said, forged in _forgeries(audit, client):
        with socket.create_server(("127.0.0.1", 0)) as listener, TemporaryDirectory() as folder:
            port = listener.getsockname()[1]
            words = client.command(audit.target.name, port, client.ca, Path(folder))
            listener.settimeout(min(_CLIENT_TIME, max(audit.deadline - time.monotonic(), 0.1)))
            tries.append(_met(client, words, listener, said, forged))
    return worst(tries)


def _forgeries(audit: Audit, client: Client) -> list[tuple[str, TestLeaf]]:
    name = audit.target.name
    spec = Spec(names=(name,), subject=name[:64], eku=(SERVER,))
    forged = [("a self-signed certificate with the server's name", make(spec, None))]
    for authority in parse_certificates(read_file(Path(client.ca), "certificate file"), client.ca)[:_MOST_IMPOSTORS]:
        twin = TestAuthority.root(authority.subject)
        leaf = make(spec, twin)
        said = "the server's name, from an impostor of the authority that the client trusts"
        forged.append((said, TestLeaf(leaf.key, (*leaf.presented, twin.certificate.public_bytes(Encoding.DER)))))
    if audit.means.authority is not None:
        forged.append(("a true certificate of another server", audit.means.authority.server("other.invalid")))
    return forged


def _met(client: Client, words: list[str], listener: socket.socket, said: str, forged: TestLeaf) -> Outcome:
    """Let the client come to us, and see what it tells us."""
    try:
        process = subprocess.Popen(  # noqa: S603  # a fixed command, no shell
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
        )
    except OSError as error:
        return unclear(f"{words[0]} cannot be run: {(error.strerror or '').lower()}")
    with process:
        try:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(_CLIENT_TIME)
                told, end = _listen(connection, forged)
        except OSError:
            return unclear("the client did not connect to us", Evidence.of(said, "nothing"))
        finally:
            try:
                _, complaint = process.communicate(timeout=_CLIENT_TIME)
            except subprocess.TimeoutExpired:
                process.kill()
                _, complaint = process.communicate()
    evidence = Evidence.of(said, told or f"{end}; {client.kind} says: {_text(complaint)}")
    if end == _FINISHED:  # in TLS 1.3 it has shown its own certificate by now, whatever it says later
        return failed(f"{client.kind} finished the handshake with us", evidence)
    return passed(f"{client.kind} ended the handshake ({end})", evidence)


def _listen(connection: socket.socket, forged: TestLeaf) -> tuple[bytes, str]:
    """Be the server; return what the client told us, and how it ended."""
    tls = TLSConnection(connection)
    settings = HandshakeSettings()
    settings.ticket_count = 0
    key = parsePEMKey(forged.key_pem.decode(), private=True)
    try:
        tls.handshakeServer(
            certChain=chain_of(forged), privateKey=key, settings=settings, alpn=[bytearray(b"http/1.1")]
        )
    except TLSRemoteAlert as alert:
        return b"", f"the alert {alert_name(alert.description)}"
    except TLSAbruptCloseError:
        return b"", "closed"
    except (TLSError, OSError) as error:
        return b"", f"broken off: {error}"
    with suppress(TLSError, OSError):
        return bytes(tls.read(max=MAX_REPLY, min=1)), _FINISHED
    return b"", _FINISHED


def _text(data: bytes) -> str:
    line = data.decode("utf-8", "replace").strip().splitlines()
    return line[-1] if line and printable(line[-1]) else "nothing"


CHECKS = (
    Check(
        "outsider.person-in-the-middle",
        "Somebody on the way answers a client in the server's place, with a certificate of their own making.",
        "The client finds out before it says anything.",
        Severity.CRITICAL,
        ("RFC 9525", "CVE-2014-1266", "CWE-295", "CWE-297"),
        Remedies(
            handfast="`handfast connect` verifies the server's chain and name; there is no switch against it",
            nginx="as a client: proxy_ssl_verify on; proxy_ssl_trusted_certificate F; proxy_ssl_name NAME",
            haproxy="as a client: server … ssl verify required ca-file F verifyhost NAME",
            envoy="as a client: UpstreamTlsContext with trusted_ca and match_typed_subject_alt_names",
            apache="as a client: SSLProxyVerify require, SSLProxyCACertificateFile, SSLProxyCheckPeerName on",
        ),
        _middle,
        needs=(Need.CLIENT,),
        seconds=90,
        tls=False,
    ),
)
