"""`handfast status`: what it shows of a guard, once and live, and what it says when there is none."""

from __future__ import annotations

import codecs
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import pytest

from handfast.cli.status import _span, _wait, fetch, parse_admin, read_status, view, words_of
from handfast.errors import Exit, HandfastError, InvalidInput, Reason
from handfast.guard.admin import Drain, Status, status_of
from handfast.guard.metrics import Metrics, State
from tests.guard.test_admin import Watched, in_force
from tests.support.programs import HANDFAST, environment, free_port, handfast, made, refused

LONG = 30.0  # seconds for a line to come


def status(metrics: Metrics, at: float, *unready: str, draining: Drain | None = None) -> Status:
    """What a guard says at an instant."""
    state: State = metrics.state()
    state["workers"][0]["started"] = 1000.0
    made_: Status = status_of(state, {"main": "127.0.0.1:8443"}, list(unready), draining)
    return made_ | {"now": at}


def lines(now: Status, before: Status | None = None, width: int = 80) -> list[str]:
    return [click.unstyle(line) for line in view(now, before, width)]


def line(pattern: str, found: list[str]) -> str:
    """The one line that has this in it."""
    (one,) = [each for each in found if re.search(pattern, each)]
    return one


def busy() -> Metrics:
    metrics = Metrics()
    metrics.set_snapshot(7, 1200.0, {"main": 2000.0 + 3 * 3600 + 60, "old": 1400.0}, {"main, CN=Root": 1940.0})
    metrics.reload("kept", "input.not_key")
    metrics.upstream("app", "127.0.0.1:8000", True, 12)
    metrics.upstream("other", "127.0.0.1:8001", False, 0)
    for _ in range(30):
        metrics.connection_opened("main")
        metrics.handshake("accept", "", 0.002, "main")
        metrics.request("main", "allow", "policy.rule_matched", 200, 0.0004)
    metrics.handshake("deny", "verify.expired", 0.002, "main")
    metrics.request("main", "deny", "limit.requests", 429, 0.0001)
    metrics.limited("limit.requests")
    return metrics


def test_one_view_shows_what_there_is() -> None:
    """Listeners, refusals with words and remedy, certificates, snapshot, reloads, upstreams and workers are shown."""
    shown = lines(status(busy(), 2000.0))
    assert shown[0].startswith("handfast ")
    assert "up 16 min 40 s   1 worker   ready" in shown[0]
    assert line("^main ", shown).split() == ["main", "127.0.0.1:8443", "30", "30", "1", "31"]
    assert line("verify.expired", shown).split() == ["verify.expired", "1"]
    assert "    the certificate expired on …" in shown
    assert "    next: issue a new one: handfast issue NAME" in shown
    assert line("limit.requests", shown).split() == ["limit.requests", "1"]
    assert "ends in 3 h 1 min" in line("^  main", shown)
    assert "ENDED 10 min ago" in line("^  old", shown)
    assert "WAS DUE" in line("^  list of main, CN=Root", shown)
    assert "number 7, loaded 13 min 20 s ago" in line("^  snapshot", shown)
    assert "1 kept: input.not_key" in line("reloads", shown)
    assert "healthy, 12 connections" in line("^  app", shown)
    assert "DOWN" in line("^  other", shown)
    assert f"process {os.getpid()}" in line("process", shown)


def test_names_that_are_alike_stay_apart() -> None:
    """Upstreams that begin alike, and those that end alike, can be told from each other."""
    metrics = busy()
    for name in ("127.0.0.1:18104", "127.0.0.1:18105", "a-service-in-a-far-region-1", "a-service-in-a-far-region-2"):
        metrics.upstream(name, f"{name}.svc.cluster.internal:8443", True, 0)
    shown = [each for each in lines(status(metrics, 2000.0)) if "healthy, 0 conn" in each]
    assert len(set(shown)) == 4
    assert any("127.0.0.1:18104 " in each for each in shown)
    assert any("-region-2 " in each for each in shown)


def test_between_two_views_there_are_rates() -> None:
    """Of two states, what is shown as a rate is what came between them, and latency is of that time alone."""
    metrics = busy()
    before = status(metrics, 2000.0)
    for _ in range(10):
        metrics.handshake("deny", "verify.unknown_issuer", 0.002, "main")
        metrics.request("main", "allow", "policy.rule_matched", 200, 3.0)
    shown = lines(status(metrics, 2002.0), before)
    assert "accepted/s  refused/s" in shown[2]
    assert line("^main ", shown).split() == ["main", "127.0.0.1:8443", "30", "0.0", "5.0", "5.0"]
    assert line("verify.unknown_issuer", shown).split() == ["verify.unknown_issuer", "10", "5.0"]
    assert shown.index(line("verify.unknown_issuer", shown)) < shown.index(line("verify.expired", shown))
    assert line("^  request", shown).split() == ["request", "3.75", "s", "4.97", "s"]
    assert line("^  handshake", shown).split() == ["handshake", "-", "-"]
    assert re.search(r"CPU \d+ %", line("process", shown))


def test_a_drain_has_a_bar() -> None:
    """While a guard drains, a bar shows how far it is, how many are left and how long they may take."""
    metrics = busy()
    for _ in range(18):
        metrics.connection_closed("main")
    now = status(metrics, 2000.0, "it is draining", draining=Drain(of=30, seconds_left=14.2))
    shown = lines(now)
    assert "not ready: it is draining" in shown
    assert "draining  [##################............]  12 of 30 left, 14 s at most" in shown


def test_troubles_are_shown() -> None:
    """No snapshot, a log that cannot be written and a silent worker stand out."""
    metrics = Metrics()
    metrics.log_broken(True)
    now = status(metrics, 2000.0, "no snapshot is in force")
    now["state"]["workers"][0]["silent"] = 7.0
    shown = lines(now)
    assert "not ready: no snapshot is in force" in shown
    assert "NONE IN FORCE" in line("^  snapshot", shown)
    assert "CANNOT BE WRITTEN" in line("^  log", shown)
    assert "SILENT for 7 s" in line("process", shown)


@pytest.mark.parametrize("width", [20, 80])
def test_the_view_fits(width: int) -> None:
    """No line is wider than the terminal, and nothing in it moves the cursor, whatever names there are."""
    metrics = busy()
    metrics.set_snapshot(1, 0.0, {"x" * 200: 1e9, "\x1b[2J\r\n": 1e9})
    metrics.upstream("y" * 200, "[2001:db8::1]:65535" * 5, True, 123456789)
    metrics.connection_opened("z" * 300)
    metrics.ended("é" * 100)
    now = status(metrics, 1e8)
    now["listeners"]["z" * 300] = "[2001:db8:1:2:3:4:5:6]:65535" * 3
    found = lines(now, status(busy(), 1e8 - 1), width)
    assert max(map(len, found)) <= width
    assert all(each.isprintable() for each in found)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1 min"), (3 * 3600 + 5, "3 h"), (90000, "1 d 1 h"), (-5, "0 s")],
)
def test_lengths_of_time_in_words(seconds: float, words: str) -> None:
    """A length of time is said in its largest units."""
    assert _span(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "-"), (0.00042, "0.42 ms"), (0.0123, "12.3 ms"), (1.234, "1.23 s"), (float("inf"), "> 60 s")],
)
def test_waits_in_words(seconds: float | None, words: str) -> None:
    """A wait has three digits and a unit."""
    assert _wait(seconds) == words


def test_every_reason_has_words_without_its_facts() -> None:
    """Each code has a sentence that needs no facts; a code that is not ours has none."""
    for reason in Reason:
        message, hint = words_of(reason.code)
        assert message
        assert "{" not in message + hint
    assert words_of("nobody.knows") == ("", "")


def test_once_and_json(tmp_path: Path) -> None:
    """Into a pipe the view is printed once, plain; --json prints what the guard said."""
    with Watched(in_force(busy())) as watched:
        done = handfast("status", "--admin", f"127.0.0.1:{watched.port}", folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\x1b" not in done.stdout
        assert line("^main ", done.stdout.splitlines()).split()[:3] == ["main", "127.0.0.1:8443", "30"]
        found = made("status", "--admin", f"http://127.0.0.1:{watched.port}/", folder=tmp_path)
        assert found["state"]["connections"] == {"main": 30}


def test_a_unix_socket(tmp_path: Path) -> None:
    """unix:PATH asks the guard on that socket."""
    with Watched(in_force(busy()), path=tmp_path / "admin.sock"):
        place = parse_admin(f"unix:{tmp_path / 'admin.sock'}")
        assert read_status(place, fetch(place))["state"]["connections"] == {"main": 30}


@pytest.mark.parametrize("place", ["127.0.0.1", "127.0.0.1:x", "https://127.0.0.1:9464", "unix:"])
def test_a_place_that_is_none(place: str) -> None:
    """What is no address of an admin listener is refused as such."""
    with pytest.raises(InvalidInput) as refusal:
        parse_admin(place)
    assert refusal.value.reason is Reason.INPUT_ADDRESS


@pytest.mark.parametrize("place", ["127.0.0.1:{port}", "unix:{folder}/none.sock"])
def test_no_guard_there(place: str, tmp_path: Path) -> None:
    """Where nobody listens, it is exit 6 with the next command."""
    asked = place.format(port=free_port(), folder=tmp_path)
    code, error = refused("status", "--admin", asked, folder=tmp_path)
    assert (code, error["error"]) == (Exit.UNREACHABLE, "admin.unreachable")
    assert "handfast status --admin HOST:PORT" in error["hint"]


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A server that gives each connection this answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client, suppress(OSError):  # it reads no more than it has to
                    client.recv(4096)
                    client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def _http(body: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (b"SSH-2.0-OpenSSH\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{", "no HTTP|other JSON"),
        (_http(b"hello"), "other JSON"),
        (_http(b'{"version": 3}'), "other JSON"),
        (_http(b"gone", 404), "answers 404"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (9 << 20), "does not end"),
    ],
    ids=["ssh", "cut", "text", "json", "404", "endless"],
)
def test_what_answers_is_no_guard(answer: bytes, detail: str) -> None:
    """Another server there is told from a guard, and its answer is read within bounds."""
    with answering(answer) as port:
        place = parse_admin(f"127.0.0.1:{port}")
        with pytest.raises(HandfastError) as refusal:
            read_status(place, fetch(place))
    assert refusal.value.reason is Reason.ADMIN_NOT_OURS
    assert re.search(detail, str(refusal.value))


def test_states_of_another_version_are_told() -> None:
    """A guard that counts other things is not shown as if it counted nothing."""
    now = status(busy(), 1.0)
    del now["state"]["counters"]["limited"]
    with pytest.raises(HandfastError) as refusal:
        read_status(parse_admin("9464"), json.dumps(now))
    assert refusal.value.reason is Reason.ADMIN_NOT_OURS


class Terminal:
    """The command in a terminal of 80 by 60; what it draws is kept."""

    def __init__(self, *words: str) -> None:
        self.drawn = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end within a character
        self._ours, theirs = pty.openpty()
        env = environment(TERM="xterm", COLUMNS="80", LINES="60")
        self.process = subprocess.Popen(
            [sys.executable, *HANDFAST[1:], *words], stdin=theirs, stdout=theirs, stderr=theirs, env=env
        )
        os.close(theirs)

    def until(self, pattern: str) -> str:
        """Read until this has been drawn; return all that was drawn up to it, and pass over it."""
        deadline = time.monotonic() + LONG
        while not (found := re.search(pattern, self.drawn, re.S)):
            assert time.monotonic() < deadline, self.drawn
            self.read()
        taken, self.drawn = self.drawn[: found.end()], self.drawn[found.end() :]
        return taken

    def read(self) -> bool:
        """Read what comes within a moment; False at the end."""
        if not select.select([self._ours], [], [], 0.2)[0]:
            return True
        try:
            piece = os.read(self._ours, 1 << 16)
        except OSError:  # EIO: how Linux says that the other side is closed
            return False
        self.drawn += self._decoder.decode(piece)
        return bool(piece)

    def end(self) -> int:
        """Read to the end, and return the exit code."""
        while self.read():
            pass
        os.close(self._ours)
        return self.process.wait(LONG)


def test_live_in_a_terminal() -> None:
    """It is drawn anew over itself with rates, and Ctrl-C leaves the last view and exit 0."""
    with Watched(in_force(busy())) as watched:
        terminal = Terminal("status", "--admin", f"127.0.0.1:{watched.port}")
        first = terminal.until(r"workers.*?\x1b\[J")
        assert first.startswith("\x1b[?1049h\x1b[?25l\x1b[H")
        for _ in range(50):
            watched.metrics.handshake("deny", "verify.revoked", 0.01, "main")
        second = terminal.until(r"verify\.revoked.*?\x1b\[J")
        assert "\x1b[H" in second
        assert "accepted/s" in second
        assert "\x1b[2J" not in second, "clearing the whole screen would flicker"
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == Exit.OK
    _, _, after = terminal.drawn.rpartition("\x1b[?25h\x1b[?1049l")
    assert "verify.revoked" in after


def test_a_guard_that_goes_away_and_comes_back() -> None:
    """An answer that does not come is said above the last view, and the next one takes its place."""
    with Watched(in_force(busy())) as watched:
        terminal = Terminal("status", "--admin", f"127.0.0.1:{watched.port}")
        terminal.until(r"ready.*?\x1b\[J")
        watched.fault = RuntimeError("out of order")
        terminal.until(r"it answers 500.*?the last that was seen:.*?\x1b\[J")
        watched.fault = None
        terminal.until(r"\x1b\[Hhandfast|\x1b\[H\x1b\[32mhandfast")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == Exit.OK


def test_the_end_of_a_drain_is_the_end() -> None:
    """When a guard that was draining is gone, that is said, and the command ends with exit 0."""
    with Watched(in_force(busy()), draining=Drain(of=30, seconds_left=9)) as watched:
        terminal = Terminal("status", "--admin", f"127.0.0.1:{watched.port}")
        terminal.until(r"draining  \[.*?\x1b\[J")
    assert terminal.end() == Exit.OK
    assert f"the guard at 127.0.0.1:{watched.port} has stopped" in terminal.drawn
