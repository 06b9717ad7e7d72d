"""Real programs beside ours: found, run to their end or as children, and always ended with the test."""

from __future__ import annotations

import json
import os
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

PATH = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin"  # where Debian keeps nginx
HANDFAST = (sys.executable, "-m", "handfast")
REQUEST = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
WAIT = 60.0  # seconds until a program counts as hung; a browser takes long to start on a slow machine

Finished = subprocess.CompletedProcess[str]


def program(name: str) -> str:
    """The path of a program; the test fails where it is missing (`make programs` brings all of them)."""
    found = shutil.which(name, path=PATH)
    assert found is not None, f"{name} is not installed: make programs"
    return found


def environment(**more: str) -> dict[str, str]:
    """The environment that programs get: ours without a passphrase, with unbuffered output and plain English."""
    ours = {name: value for name, value in os.environ.items() if name != "HANDFAST_PASSPHRASE"}
    return {**ours, "PATH": PATH, "PYTHONUNBUFFERED": "1", "LC_ALL": "C.UTF-8", **more}


def run(*words: str | Path, folder: Path, stdin: str = "", env: Mapping[str, str] | None = None) -> Finished:
    """Run a program to its end in `folder`. One that hangs is killed with all its children, and fails the test."""
    line = [program(str(words[0])), *map(str, words[1:])]
    with subprocess.Popen(
        line,
        cwd=folder,
        env=dict(env or environment()),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(stdin, WAIT)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return Finished(line, process.returncode, out, err)


def must(*words: str | Path, folder: Path, stdin: str = "", env: Mapping[str, str] | None = None) -> str:
    """Run a program that has to succeed; return its standard output."""
    done = run(*words, folder=folder, stdin=stdin, env=env)
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def handfast(*words: str | Path, folder: Path) -> Finished:
    """Run a verb of ours to its end."""
    return run(*HANDFAST, *words, folder=folder)


def made(*words: str | Path, folder: Path) -> Any:
    """Run a verb of ours that has to succeed with --json; return what it printed."""
    return json.loads(must(*HANDFAST, *words, "--json", folder=folder))


def refused(*words: str | Path, folder: Path) -> tuple[int, dict[str, Any]]:
    """Run a verb of ours that has to fail with --json; return its exit code and its error."""
    done = handfast(*words, "--json", folder=folder)
    assert done.returncode != 0, done.stdout
    error: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, error


def free_port() -> int:
    """A port on which nothing listens, below those that the kernel gives to outgoing connections.

    Each of the processes that run tests at once has a range of its own: none takes another's before it is bound.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 16
    while True:
        port = 20_000 + number * 750 + random.randrange(750)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


@dataclass
class Child:
    """A program that runs until the `with` ends; its output is read as it comes. `merge`: errors come along."""

    words: tuple[str | Path, ...]
    folder: Path
    env: Mapping[str, str] | None = None
    merge: bool = True
    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __enter__(self) -> Child:
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            [program(str(self.words[0])), *map(str, self.words[1:])],
            cwd=self.folder,
            env=dict(self.env or environment()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if self.merge else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._readers = [threading.Thread(target=self._read, args=(self._process.stdout,))]
        if not self.merge:
            self._readers.append(threading.Thread(target=self._read_errors, args=(self._process.stderr,)))
        for reader in self._readers:
            reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int:
        """Ask it to end, as `kill` does; return its exit code."""
        with self._process as process:
            process.terminate()
            try:
                process.wait(WAIT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            finally:
                for reader in self._readers:
                    reader.join()
        return process.returncode

    def line(self, pattern: str = "") -> str:
        """The next line that has `pattern` (a regular expression) in it; others before it are passed over."""
        while True:
            try:
                line = self._queue.get(timeout=WAIT)
            except queue.Empty:
                line = None
            if line is None:
                self._queue.put(None)
            said = "\n".join([*self.lines, *self.errors])
            assert line is not None, f"{self.words}: no line like {pattern!r} in:\n{said}"
            if re.search(pattern, line):
                return line

    def _read(self, stream: TextIO) -> None:
        for line in stream:
            self.lines.append(line.rstrip("\n"))
            self._queue.put(self.lines[-1])
        self._queue.put(None)

    def _read_errors(self, stream: TextIO) -> None:
        self.errors += [line.rstrip("\n") for line in stream]


@dataclass
class Served:
    """A guard that runs as a child: its first event and those to come."""

    child: Child
    ready: dict[str, Any]

    @property
    def port(self) -> int:
        return int(self.ready["url"].rpartition(":")[2])

    @property
    def url(self) -> str:
        """Its address as the walk-through writes it: by name."""
        return f"https://localhost:{self.port}/"

    def next(self, kind: str) -> dict[str, Any]:
        """The next event of this kind; others before it are passed over."""
        while True:
            event: dict[str, Any] = json.loads(self.child.line())
            if event["event"] == kind:
                return event


@contextmanager
def served(*words: str | Path, folder: Path) -> Iterator[Served]:
    """`handfast guard` or `up` on a free port, from its ready line to a clean end."""
    line = (*HANDFAST, *words, "--listen", "127.0.0.1:0", "--json")
    with Child(line, folder, merge=False) as child:
        ready = json.loads(child.line())
        assert ready.get("event") == "ready", ready
        yield Served(child, ready)
        code = child.stop()
    assert (code, child.errors) == (0, [])
    assert json.loads(child.lines[-1])["event"] == "stopped"


@dataclass(frozen=True)
class Answer:
    """What curl got: the status (0 without an answer), the body, and curl's own complaint."""

    status: int
    body: str
    complaint: str

    @property
    def error(self) -> str:
        """The code in a refusal's body."""
        code: str = json.loads(self.body)["error"]
        return code


def curl(url: str, *words: str | Path, folder: Path) -> Answer:
    """One request with curl."""
    done = run("curl", "-sS", "-w", "\n%{http_code}", *words, url, folder=folder)
    body, _, status = done.stdout.rpartition("\n")
    return Answer(int(status), body, done.stderr)


def s_client(port: int, *words: str | Path, folder: Path, stdin: str = REQUEST) -> str:
    """All that `openssl s_client` says while it sends `stdin` and reads until the server closes."""
    common = ("-connect", f"127.0.0.1:{port}", "-servername", "localhost", "-ign_eof")
    done = run("openssl", "s_client", *common, *words, folder=folder, stdin=stdin)
    return done.stdout + done.stderr


@contextmanager
def s_server(*words: str | Path, folder: Path) -> Iterator[tuple[int, Child]]:
    """`openssl s_server` on a free port; it sends back each line reversed, and closes at the line CLOSE."""
    line = ("openssl", "s_server", "-accept", "127.0.0.1:0", "-rev", *words)
    with Child(line, folder) as child:
        yield int(child.line(r"^ACCEPT").rpartition(":")[2]), child


@contextmanager
def nginx(server: str, folder: Path) -> Iterator[Child]:
    """nginx with one server block, all of its files in `folder`."""
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"    {name}_temp_path {name}_temp;\n" for name in names)
    main = "daemon off;\nmaster_process off;\npid nginx.pid;\nerror_log stderr notice;\nevents {}\n"
    (folder / "nginx.conf").write_text(f"{main}http {{\n    access_log off;\n{temporary}{server}}}\n")
    with Child(("nginx", "-p", folder, "-c", folder / "nginx.conf", "-e", "stderr"), folder) as child:
        child.line("event method")  # it listens by then
        yield child


@dataclass(frozen=True)
class Browser:
    """Headless Chromium with a home, and so a certificate database, of its own."""

    home: Path

    @property
    def database(self) -> str:
        return f"sql:{self.home / '.pki' / 'nssdb'}"

    def prepare(self) -> Browser:
        """Make the certificate database."""
        (self.home / ".pki" / "nssdb").mkdir(parents=True)
        must("certutil", "-N", "-d", self.database, "--empty-password", folder=self.home)
        return self

    def take(self, p12: Path, password: str) -> None:
        """Import a key and certificate, as a user does in the browser's settings."""
        must("pk12util", "-i", p12, "-d", self.database, "-W", password, folder=self.home)

    def trust(self, ca: Path) -> None:
        """Trust an authority to vouch for servers."""
        must("certutil", "-A", "-n", "ca", "-t", "C,,", "-i", ca, "-d", self.database, folder=self.home)

    def page(self, url: str, *switches: str) -> str:
        """The page at `url`. A certificate that the server takes is chosen unasked, as the policy
        AutoSelectCertificateForUrls has it; it is kept as a setting of the profile, so that no file of the system
        is touched.
        """
        profile = self.home / "profile"
        origin = url.rstrip("/")
        choice: dict[str, object] = {f"{origin},*": {"setting": {"filters": [{}]}}}
        settings = {"profile": {"content_settings": {"exceptions": {"auto_select_certificate": choice}}}}
        (profile / "Default").mkdir(parents=True, exist_ok=True)
        (profile / "Default" / "Preferences").write_text(json.dumps(settings))
        quiet = ("background-networking", "component-update", "sync", "gpu", "quic", "extensions")
        line = ("chromium", "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in quiet))
        env = {"HOME": str(self.home), "PATH": PATH, "LC_ALL": "C.UTF-8"}
        return must(*line, *switches, f"--user-data-dir={profile}", "--dump-dom", url, folder=self.home, env=env)
