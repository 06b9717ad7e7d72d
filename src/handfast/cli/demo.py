"""The verb `demo`: an app guarded, one client let through, others refused, and why. It leaves nothing behind."""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click

from handfast.cli.output import as_json_option, example, print_json
from handfast.errors import HandfastError, Reason, Unreachable
from handfast.pki.names import parse_name
from handfast.pki.verification import Purpose, Terms, verify
from handfast.tls.client import ClientHandshake
from handfast.tls.credential import Credential, load_bundle, load_credential
from handfast.tls.judge import judge_offline

_PATIENCE = 30.0  # seconds for each step on a slow machine; each takes well under one


@dataclass(slots=True)
class _Stage:
    """What the demo stands on: its folder, its guard's events, and what it has shown."""

    folder: Path
    as_json: bool
    events: queue.Queue[dict[str, Any]] = field(default_factory=queue.Queue)
    shown: list[dict[str, Any]] = field(default_factory=list)
    served: list[str] = field(default_factory=list)  # the identities that the app saw

    def say(self, text: str) -> None:
        if not self.as_json:
            click.echo(text)

    def event(self, kind: str) -> dict[str, Any]:
        while True:
            try:
                event = self.events.get(timeout=_PATIENCE)
            except queue.Empty:
                raise Unreachable(Reason.UNREACHABLE, target="the guard", detail=f"no {kind} event came") from None
            if event["event"] == kind:
                return event


@click.command(
    "demo", epilog=example("handfast demo"), short_help="See it work: an app, a guard, and who gets through."
)
@as_json_option
def demo_(as_json: bool) -> None:
    """Start a small app and a guard before it, call it as someone who may and as some who may not, and say why.

    Everything is in a folder that is removed at the end, and on ports that were free.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="handfast-demo-") as folder:
        stage = _Stage(Path(folder), as_json)
        with _app(stage) as port, _guard(stage, port) as ready:
            _play(stage, ready)
    took = time.monotonic() - began
    stage.say(f"\nThe app served {len(stage.served)} request, by {stage.served[0]}. It took {took:.1f} s.")
    stage.say("Guard an app of yours:  handfast up --to 127.0.0.1:8000")
    if as_json:
        print_json({"steps": stage.shown, "served": stage.served, "seconds": round(took, 1)})
    if stage.served != ["spiffe://handfast.internal/alice"]:
        raise AssertionError(f"the app was reached by {stage.served}")


def _play(stage: _Stage, ready: dict[str, Any]) -> None:
    state = stage.folder / "state"
    alice = load_credential(Path(ready["client"]["cert"]), Path(ready["client"]["key"]))
    bob = _issue(stage, state, "bob")
    impostor = _issue(stage, stage.folder / "elsewhere", "alice")
    stage.say(f"Guarded: {ready['url']}, allowed: alice. It asks every client for a certificate.\n")
    _call(stage, ready, "alice, with her certificate", alice, 200)
    _call(stage, ready, "somebody without a certificate", None, 403)
    _call(stage, ready, "an 'alice' of another authority", impostor, 403)
    _call(stage, ready, "bob, who is known but not allowed", bob, 403)
    _run("revoke", "alice", "--state", str(state), "--json")
    ended = time.monotonic() + _PATIENCE
    while stage.event("reload")["outcome"] != "taken" and time.monotonic() < ended:
        pass
    _call(stage, ready, "alice, after: handfast revoke alice", alice, 403)


def _call(stage: _Stage, ready: dict[str, Any], who: str, credential: Credential | None, wanted: int) -> None:
    status, body = _ask(ready["url"], Path(ready["ca"]), credential)
    event = stage.event("request") if status == 200 or "policy." in body else stage.event("connection")
    while event["decision"] == "accept":
        event = stage.event("connection")
    stage.shown.append({"who": who, "status": status, "reason": event["reason"], "detail": event.get("detail")})
    mark = "let through" if status == 200 else "refused"
    stage.say(f"{mark:<11}  {who}\n             {status}: {body.strip()}")
    if event.get("detail"):
        stage.say(f"             because {event['detail']}")
    if event.get("remedy"):
        stage.say(f"             to change it: {event['remedy']}")
    if status != wanted:
        raise AssertionError(f"{who}: {status} instead of {wanted}: {body}")


def _ask(url: str, ca: Path, credential: Credential | None) -> tuple[int, str]:
    """GET / with or without a certificate. The server is verified before a byte is sent."""
    host, _, port = url.removeprefix("https://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=_PATIENCE) as connection:
        handshake, records = ClientHandshake(None, credential), b""
        while (channel := handshake.feed(records)) is None:
            connection.sendall(handshake.take())
            records = connection.recv(1 << 16)
        now, bundle, chain = datetime.now(UTC), load_bundle(ca), handshake.facts.chain
        verify(chain, Terms(bundle, Purpose.SERVER, parse_name(host)), now, judge_offline(chain, bundle, now))
        channel.write(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        connection.sendall(handshake.take() + channel.take())
        answer = b""
        while not channel.at_eof and (records := connection.recv(1 << 16)):
            channel.feed(records)
            while plain := channel.read():
                answer += plain
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


@contextmanager
def _app(stage: _Stage) -> Iterator[int]:
    class Greeter(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            who = self.headers.get("Client-Identity", '"nobody"').strip('"')
            stage.served.append(who)
            body = f"Hello, {who}\n".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Greeter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        stage.say(f"An app that greets: http://127.0.0.1:{port}")
        yield port
        server.shutdown()


@contextmanager
def _guard(stage: _Stage, port: int) -> Iterator[dict[str, Any]]:
    words = ["up", "--to", f"127.0.0.1:{port}", "--listen", "127.0.0.1:0", "--client", "alice", "--allow", "alice"]
    command = [*_command(), *words, "--json", "--state", str(stage.folder / "state")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603  # ours
    assert process.stdout is not None

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            stage.events.put(json.loads(line))

    threading.Thread(target=read, daemon=True).start()
    try:
        yield stage.event("ready")
    finally:
        process.terminate()
        process.communicate(timeout=_PATIENCE)


def _issue(stage: _Stage, state: Path, name: str) -> Credential:
    out = stage.folder / f"{state.name}-{name}"
    if not (state / "ledger.db").exists():
        _run("authority", "init", "--state", str(state), "--json")
    _run("issue", name, "--state", str(state), "--out", str(out), "--json")
    return load_credential(out / f"{name}.crt", out / f"{name}.key")


def _run(*words: str) -> None:
    command = [*_command(), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)  # noqa: S603  # ours
    if done.returncode != 0:
        raise HandfastError(Reason.BUG, detail=f"handfast {words[0]}: {done.stdout}{done.stderr}")


def _command() -> list[str]:
    return [sys.executable, "-m", "handfast"]
