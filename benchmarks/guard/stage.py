"""What the measurements stand on: throwaway certificates, the compiled load, apps, and processes that always end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from peers import IDENTITY, MANY, App, Peer, Place, nginx_command, nginx_head

from handfast.files import generate_key, write_private
from handfast.pki.issuing import Issuer, Order, build_certificate, make_serial, sign
from handfast.pki.keys import KeyType, encode_private_key
from handfast.pki.names import parse_name
from handfast.pki.profiles import PROFILES

PROXY_CORE, LOAD_CORE = 0, 1
BODY = 64 << 20  # bytes of a download or an upload
STRANGERS = 5000  # more chains than the guard remembers, so that it has seen none of them lately
PATIENCE = 30.0  # seconds until something counts as hung
HUNG = 180.0  # seconds until a load does
NO_PROTOCOL = 3  # what the load ends with where the peer does not speak h2


class Void(Exception):
    """The measurement says nothing; why."""


class Lacking(Exception):
    """The peer does not speak the protocol."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The folder of the run, its certificates, its load, and the ports of the apps."""

    folder: Path
    pki: Path
    load: Path
    apps: dict[App, int]


@dataclass(frozen=True, slots=True)
class Running:
    """A peer that listens."""

    peer: Peer
    process: subprocess.Popen[bytes]
    port: int

    def processor(self) -> tuple[set[int], float]:
        """Its processes, and the seconds of processor that they have used: user and system, ended threads too.

        The clock of clock_getcpuclockid(3): what /proc/PID/stat says in ticks of 10 ms, in nanoseconds.
        """
        pids = _tree(self.process.pid)
        return pids, sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)

    def resident(self) -> int:
        """Bytes of memory that its processes hold."""
        return sum(_resident(pid) for pid in _tree(self.process.pid))


def _tree(pid: int) -> set[int]:
    found = {pid}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended as we looked
            for child in (task / "children").read_text().split():
                found |= _tree(int(child))
    return found


def _resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    """Make the certificates, compile the load, start the apps; stop them at the end."""
    os.sched_setaffinity(0, {LOAD_CORE})
    with ExitStack() as stack:
        pki = make_certificates(folder / "pki")
        load = folder / "load"
        source = Path(__file__).with_name("load.c")
        subprocess.run(["cc", "-O2", "-o", str(load), str(source), "-lssl", "-lcrypto"], check=True)
        apps = {App.PAGE: _page(stack, folder / "page")}
        for app in (App.SINK, App.ECHO, App.HELLO):
            apps[app] = free_port()
            spawn(stack, [str(load), str(app), str(apps[app])], folder / f"{app}.log", LOAD_CORE)
        for port in apps.values():
            wait_for(port)
        yield Stage(folder, pki, load, apps)


# Certificates


def make_certificates(folder: Path) -> Path:
    """One self-signed P-256 authority of openssl's, and what handfast issues from it: no certificate in between."""
    folder.mkdir()
    extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign"]
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    request += ["-subj", "/CN=bench root", "-days", "7", "-keyout", "root.key", "-out", "root.crt"]
    _quietly(folder, *request, *(word for text in extensions for word in ("-addext", text)))
    _handfast(folder, "authority", "import", "--cert", "root.crt", "--key", "root.key")
    _handfast(folder, "issue", "localhost", "127.0.0.1", "--profile", "server", "--out", ".")
    _handfast(folder, "issue", "web", "--out", ".", "--force")
    for kind in ("crt", "key"):
        (folder / f"localhost.{kind}").rename(folder / f"server.{kind}")
    write_private(folder / "server.pem", (folder / "server.crt").read_bytes() + (folder / "server.key").read_bytes())
    _make_strangers(folder)
    return folder


def _make_strangers(folder: Path) -> None:
    """Many certificates of the same name and key: each is a chain that a guard has to judge anew."""
    root = x509.load_pem_x509_certificate((folder / "root.crt").read_bytes())
    signer = load_pem_private_key((folder / "root.key").read_bytes(), None)
    key = generate_key(KeyType.P256)
    order = Order(PROFILES["client"], (parse_name(IDENTITY),), key.public_key())
    now, issuer = datetime.now(UTC), Issuer(root, signer, (root,))
    made = [
        sign(build_certificate(order, issuer, make_serial(at, os.urandom(16)), now), signer).public_bytes(Encoding.PEM)
        for at in range(STRANGERS)
    ]
    (folder / "stranger.crt").write_bytes(made[0])
    (folder / "strangers.crt").write_bytes(b"".join(made))
    write_private(folder / "stranger.key", encode_private_key(key))


def _handfast(folder: Path, *words: str) -> None:
    _quietly(folder, sys.executable, "-m", "handfast", *words, "--state", "state", "--json")


def _quietly(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stdout}{done.stderr}")


# Processes

_PAGE = """
http {{
  access_log off; keepalive_requests {many}; keepalive_timeout 600s; default_type text/plain;
  server {{ listen 127.0.0.1:{port} backlog=8192;
    location = / {{ return 200 "hello world\\n"; }}
    location = /big {{ root {folder}; }}
  }}
}}
"""


def _page(stack: ExitStack, folder: Path) -> int:
    folder.mkdir()
    with (folder / "big").open("wb") as big:
        big.truncate(BODY)
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(nginx_head(folder) + _PAGE.format(many=MANY, port=port, folder=folder))
    spawn(stack, nginx_command(folder, str(config)), folder / "out.log", LOAD_CORE)
    return port


def spawn(stack: ExitStack, command: list[str], log: Path, core: int) -> subprocess.Popen[bytes]:
    """Start a program on one core, in a session of its own; it ends with the stack, whatever it has started."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    stack.callback(_stop, process)
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            continue
    process.wait(PATIENCE)


def free_port() -> int:
    """A port on which nothing listens, below those that the kernel gives to outgoing connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def wait_for(port: int, alive: Callable[[], bool] = lambda: True) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline or not alive():
                raise Void("it does not listen") from None
            time.sleep(0.05)


@contextmanager
def started(stage: Stage, peer: Peer, app: App) -> Iterator[Running]:
    """Run a peer before an app. Raises Void, with the last line that it said, when it does not start."""
    folder = stage.folder / f"{peer.key}-{app}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    place = Place(folder, stage.pki, free_port(), app, stage.apps[app])
    with ExitStack() as stack:
        log = folder / "out.log"
        process = spawn(stack, peer.command(place), log, PROXY_CORE)
        try:
            wait_for(place.port, lambda: process.poll() is None)
        except Void as void:
            said = log.read_text(errors="replace").strip().splitlines()
            raise Void(f"{void}: {said[-1] if said else 'it says nothing'}") from None
        yield Running(peer, process, place.port)


# The load


@contextmanager
def loading(stage: Stage, port: int, words: tuple[str, ...], *, strangers: bool = False) -> Iterator[Callable[[], Any]]:
    """Open the load's connections. What is given runs it and returns its result; the connections end with the `with`.

    Raises Lacking or Void.
    """
    pki = stage.pki
    who = "stranger" if strangers else "web"
    command = [str(stage.load), words[0], str(port), *words[1:]]
    command += ["-C", f"{pki}/{who}.crt", "-K", f"{pki}/{who}.key", "-A", f"{pki}/ca.crt"]
    if strangers:
        command += ["-m", f"{pki}/strangers.crt"]
    process = subprocess.Popen(
        ["taskset", "-c", str(LOAD_CORE), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    orders, answers = process.stdin, process.stdout

    def line() -> str:
        if text := answers.readline():
            return text
        _, errors = process.communicate()
        if process.returncode == NO_PROTOCOL:
            raise Lacking
        raise Void(_first(errors) or "the load hung")

    def run() -> Any:
        orders.write("\n")
        orders.flush()
        result = json.loads(line())
        if result["errors"] or not result["bytes"]:
            _, errors = process.communicate()
            raise Void(f"{result['errors']} errors: {_first(errors) or 'nothing came'}")
        return result

    watchdog = threading.Timer(HUNG, process.kill)
    watchdog.start()
    with process:
        try:
            line()
            yield run
        finally:
            watchdog.cancel()
            process.kill()


def _first(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")
