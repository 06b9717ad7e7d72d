"""Twenty thousand clients that never finish what they begin do not stop the one that does."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.apps import App, client_context, get, talk
from tests.support.certs import Ca

CLIENTS = 20_000
# One source address has 28,000 ports; several keep clear of what other tests use.
SOURCES = [f"127.0.0.{last}" for last in range(10, 14)]


def _clients() -> int:
    """How many connections this machine lets one process hold: 20,000, or nearly so."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(CLIENTS, hard - 300)


@pytest.mark.timeout(400)
def test_twenty_thousand_slow_clients(ca: Ca, tmp_path: Path) -> None:
    """With 20,000 connections open that send half a handshake or nothing, a good client is served at once."""
    clients = _clients()
    if clients < CLIENTS // 2:
        pytest.skip(f"this machine lets no process have more than {clients} open files")
    cert, key = ca.server().save(tmp_path, "server")
    bundle = ca.save(tmp_path, "ca")
    with App() as app:
        command = [
            sys.executable,
            "-m",
            "handfast",
            "guard",
            "--to",
            app.address,
            "--cert",
            str(cert),
            "--key",
            str(key),
        ]
        command += ["--client-ca", str(bundle), "--listen", "127.0.0.1:0", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as guard:
            assert guard.stdout is not None
            address = json.loads(guard.stdout.readline())["url"].removeprefix("https://")
            slow: list[socket.socket] = []
            try:
                host, _, port = address.rpartition(":")
                for number in range(clients):
                    source = (SOURCES[number % len(SOURCES)], 0)
                    slow.append(socket.create_connection((host, int(port)), timeout=60, source_address=source))
                    if number % 2:
                        slow[-1].sendall(b"\x16\x03\x01\x02\x00\x01")
                context = client_context(bundle, ca.client(), tmp_path)
                assert talk(address, context, get()).startswith(b"HTTP/1.1 200 ")
                pages = int(Path(f"/proc/{guard.pid}/statm").read_text().split()[1])
                assert (
                    pages * os.sysconf("SC_PAGE_SIZE") < 600 << 20
                )  # 30 KiB each, with the SSL object of half of them
            finally:
                for each in slow:
                    each.close()
                guard.terminate()
                guard.communicate(timeout=60)
