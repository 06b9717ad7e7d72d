"""The documents: their commands run, their reference is the code's, and what they point at is there.

In a document, ```console is a terminal session that runs here. `$ ` begins a command, what follows is its
whole output; `...` stands for any text, alone on a line for any lines. Figures that differ from run to run
(ids, serials, times, ports) are compared by their shape. `handfast up`, `handfast guard` and `python3 FILE`
that serve go on running; `^C` stops the last one; ```console server is what that one prints next.
```python NAME (or toml, text, ini) is a file that the reader saves. /home/you is the reader's home.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import click
import pytest

from handfast.cli.main import handfast
from handfast.errors import Reason
from handfast.guard.config import KEYS
from tests.support.apps import App
from tests.support.programs import free_port

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# Run with its browser by tests/interop/test_walkthrough.py.
ELSEWHERE = {"replace-the-openssl-nginx-walkthrough"}
PATIENCE = 60.0  # seconds for a server's words; each comes within one on an idle machine

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)
_SERVES = re.compile(r"(handfast (up|guard|connect)|python3 (app|echo)\.py)\b")
_PORT = re.compile(r"(?<=[:( ])(8000|8001|8443|8444|7000)\b")
_VARIABLE = (
    (r"\b[0-9a-f]{64}\b", "SHA256"),
    (r"\b40[0-9a-f]{34}\b", "SERIAL"),
    (r"\b(root|issuer) [0-9a-f]{8}\b", r"\1 KEYID"),
    (r"\b[0-9a-f]{12}(-\d+)?\b", r"ID\1"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+00:00)?", "INSTANT"),
    (r"\b\d{4}-\d\d-\d\d\b", "DATE"),
    (r"\b\d\d:\d\d:\d\d\b", "CLOCK"),
    (r"ms=\d+\.\d+", "ms=N"),
    (r"address=127\.0\.0\.1:\d+", "address=ADDRESS"),
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    info: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in _FENCE.finditer(text)]


def runs(page: Path) -> bool:
    return any(block.info.startswith("console") for block in blocks(page))


def shape(text: str) -> str:
    """Text with what differs from run to run replaced by what it is."""
    for pattern, name in _VARIABLE:
        text = re.sub(pattern, name, text)
    return text


def expectation(lines: list[str]) -> re.Pattern[str]:
    """The regular expression of the output that is shown in a document."""
    made = [
        r"(?:.*\n)*?" if line == "..." else re.escape(shape(line)).replace(r"\.\.\.", ".*?") + r"\n" for line in lines
    ]
    return re.compile("".join(made))


class Server:
    """A command that goes on; what it prints is read as it comes."""

    def __init__(self, command: str, reader: Reader) -> None:
        self._reader = reader
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=reader.folder,
            env=reader.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._printed = ""
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def expect(self, lines: list[str]) -> None:
        """Wait until it has printed these lines, and pass over them."""
        wanted = expectation(lines)
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while not (found := wanted.search(self._printed)):
                if not self._changed.wait(deadline - time.monotonic()):
                    raise AssertionError(f"printed\n{self._printed}\nnot\n" + "\n".join(lines))
            self._printed = self._printed[found.end() :]

    def stop(self, number: int = signal.SIGINT) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)
        assert self._process.wait(PATIENCE) is not None

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                with self._changed:
                    self._printed += shape(self._reader.as_written(line))
                    self._changed.notify_all()


@dataclass
class Reader:
    """Somebody who does what a page says, in a home of their own, on ports that are free."""

    home: Path
    ports: dict[str, str]
    servers: list[Server] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = self.home
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin",
            "HOME": str(self.home),
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "PYTHONUNBUFFERED": "1",
        }

    def follow(self, block: Block) -> None:
        """Do what one block says. Raises AssertionError where what comes is not what it shows."""
        if block.info == "console":
            for command, shown in commands(block.text):
                self._type(command, shown)
        elif block.info == "console server":
            self.servers[-1].expect(block.text.splitlines())
        elif file := re.fullmatch(r"(?:python|text|ini|toml) (\S+)", block.info):
            (self.folder / file[1]).write_text(self.as_run(block.text))

    def as_run(self, text: str) -> str:
        """The text of a page with the ports of this run."""
        return _PORT.sub(lambda port: self.ports[port[0]], text)

    def as_written(self, text: str) -> str:
        """Output of this run with the page's ports and home."""
        text = text.replace(str(self.home), "/home/you")
        for written, real in self.ports.items():
            text = re.sub(rf"\b{real}\b", written, text)
        return text

    def _type(self, command: str, shown: list[str]) -> None:
        if command == "^C":
            self.servers[-1].stop()
            self.servers[-1].expect(shown)
            return
        command = self.as_run(command)
        if _SERVES.match(command) and not command.rstrip().endswith("--help"):
            if command.startswith("handfast") and "--listen" not in command and " -c " not in command:
                command += f" --listen 127.0.0.1:{self.ports['8443']}"
            self.servers.append(Server(command, self))
            self.servers[-1].expect(shown)
            if file := re.fullmatch(r"python3 (\S+)", command):
                self._wait_for((self.folder / file[1]).read_text())
            return
        self._run(command, shown)

    def _wait_for(self, source: str) -> None:
        """Wait until a script listens on the port that it names."""
        port = next(port for port in self.ports.values() if port in source)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", int(port)), PATIENCE).close()
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, "it does not listen"
            else:
                return

    def _run(self, command: str, shown: list[str]) -> None:
        where = self.home / ".where"
        done = subprocess.run(
            ["bash", "-c", f"{command}\nstatus=$?; pwd > {where}; exit $status"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=120,
            check=False,
        )
        self.folder = Path(where.read_text().strip())
        printed = self.as_written(done.stdout)
        assert expectation(shown).fullmatch(shape(printed)), f"$ {command}\nprinted\n{printed}\nnot\n" + "\n".join(
            shown
        )
        failure = any(line.startswith(("handfast: ", "curl: (")) for line in shown)
        assert (done.returncode != 0) is failure, f"$ {command}\nended with {done.returncode}:\n{printed}"


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a session, each with the lines that are shown as its output."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        command = "^C" if lines[at] == "^C" else lines[at].removeprefix("$ ")
        assert command != lines[at] or command == "^C", f"a session begins with a command, not {lines[at]!r}"
        at += 1
        while command.endswith("\\"):
            command = f"{command[:-1].rstrip()} {lines[at].strip()}"
            at += 1
        shown = []
        while at < len(lines) and not lines[at].startswith("$ ") and lines[at] != "^C":
            shown.append(lines[at])
            at += 1
        yield command, shown


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def reading(page: Path, home: Path) -> Iterator[Reader]:
    """Somebody who reads a page; where it has no app of its own on port 8000, one is there."""
    ports = {port: str(free_port()) for port in ("8000", "8001", "8443", "8444", "7000")}
    with App() as app:
        if "app.py" not in page.read_text():
            ports["8000"] = str(app.port)
        home.mkdir()
        (home / ".curlrc").write_text("silent\nshow-error\n")  # as it is on a terminal
        reader = Reader(home, ports)
        try:
            yield reader
        finally:
            for server in reader.servers:
                server.stop(signal.SIGKILL)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if runs(page) and page.stem not in ELSEWHERE], ids=lambda page: page.stem
)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    """Every session in the documents runs as it stands and prints what the page shows."""
    with reading(page, tmp_path / "you") as reader:
        for block in blocks(page):
            try:
                reader.follow(block)
            except AssertionError as difference:
                raise AssertionError(f"{page.relative_to(ROOT)}:{block.line}: {difference}") from None


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        (["Hello World"], "Hello World\n", True),
        (["Hello World"], "Hello\n", False),
        ([], "something\n", False),
        (
            ['{"error": "verify.expired", "id": "0123456789ab"}'],
            '{"error": "verify.expired", "id": "ba9876543210"}\n',
            True,
        ),
        (
            ['{"error": "verify.expired", "id": "0123456789ab"}'],
            '{"error": "verify.revoked", "id": "ba9876543210"}\n',
            False,
        ),
        (["first", "...", "last"], "first\nand\nmore\nlast\n", True),
        (["first", "...", "last"], "first\nand\nmore\n", False),
        (["a ... z"], "a b c z\n", True),
        (["a ... z"], "a b c\n", False),
    ],
)
def test_what_is_shown_is_compared(shown: list[str], printed: str, same: bool) -> None:
    """Output is compared to the letter but for ids and what `...` stands for."""
    assert bool(expectation(shown).fullmatch(shape(printed))) is same


def test_the_readme_has_its_shape() -> None:
    """One sentence, then a session on lines 3 to 20, then what handfast does not do, then the ladder."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert re.fullmatch(r"[^.]+\.", lines[0])
    assert (lines[1], lines[2], lines[19]) == ("", "```console", "```")
    headings = [line for line in lines if line.startswith("## ")]
    assert headings[:2] == ["## What it does not do", "## From one command to the library"]
    assert not re.search(r"\[!\[", "\n".join(lines))


def test_the_reference_is_fresh() -> None:
    """The pages of docs/reference are what `make docs` writes now, and nothing else is there."""
    pages: dict[str, str] = generator().pages()
    reference = ROOT / "docs" / "reference"
    assert {path.name for path in reference.iterdir()} == set(pages)
    stale = [name for name, text in pages.items() if (reference / name).read_text() != text]
    assert not stale, "run: make docs"


def test_the_reference_names_every_reason_and_verb() -> None:
    """No reason and no verb is left out of the reference."""
    pages: dict[str, str] = generator().pages()
    assert [reason.code for reason in Reason if f"`{reason.code}`" not in pages["reasons.md"]] == []
    helped = subprocess.run([sys.executable, "-m", "handfast", "--help"], capture_output=True, text=True, check=True)
    verbs = re.findall(r"^  ([a-z]+)  ", helped.stdout.partition("Commands:")[2], re.M)
    assert len(verbs) >= 13
    assert [verb for verb in verbs if f"## handfast {verb}\n" not in pages["cli.md"]] == []


def examples() -> list[str]:
    """The commands that end the help of each verb."""
    contexts = generator().verbs(click.Context(handfast, info_name="handfast"))
    lines = [line.strip() for context in contexts for line in (context.command.epilog or "").splitlines()]
    return sorted({line for line in lines if line.startswith("handfast ")})


@pytest.mark.parametrize("line", examples())
def test_the_examples_in_the_help_are_understood(line: str) -> None:
    """Each example that the help gives is a command with options and values that the command takes."""
    _, *words = shlex.split(line)
    command: click.Command | None = handfast
    while isinstance(command, click.Group):
        command = command.get_command(click.Context(command), words.pop(0))
    assert command is not None
    command.make_context(line, words).close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_at_is_there(page: Path) -> None:
    """Links lead to files and headings, cited tests exist, and reason codes are of the table."""
    text = page.read_text()
    prose = _FENCE.sub("", text)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in slugs(target), f"{link}: no such heading"
    for file, name in re.findall(r"\b(tests/[\w/]+\.py)(?:::(\w+))?", text):
        source = (ROOT / file).read_text()
        assert not name or f"def {name}(" in source, f"{file} has no {name}"
    kinds = {reason.code.partition(".")[0] for reason in Reason if "." in reason.code}
    cited = re.findall(rf"`((?:{'|'.join(sorted(kinds))})\.[a-z0-9_]+)`", prose)
    known = {reason.code for reason in Reason} | {one.key for one in KEYS}  # `admin.listen` is a key, not a reason
    assert [code for code in cited if code not in known] == []


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_programs_of_the_pages_are_here() -> None:
    """What the sessions call beside handfast is installed, so that no page passes for want of it."""
    assert [name for name in ("bash", "curl", "openssl") if shutil.which(name) is None] == []
