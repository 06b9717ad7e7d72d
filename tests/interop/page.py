"""A page of the manual as a reader follows it: its console blocks, command by command."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.programs import Child, must

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PORT = re.compile(r"\b8\d{3}\b")
_ID = re.compile(r"\b[0-9a-f]{12}\b")


@dataclass(frozen=True)
class Command:
    """A line that is typed, and the output that the page shows beneath it."""

    line: str
    output: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """The commands of a page, in order."""

    commands: tuple[Command, ...]

    @classmethod
    def read(cls, path: Path) -> Page:
        blocks = "".join(_BLOCK.findall(path.read_text()))
        first, *typed = re.split(r"^\$ ", blocks, flags=re.MULTILINE)
        assert first == "", f"output without a command: {first}"
        return cls(tuple(Command(line, tuple(output)) for line, *output in (text.splitlines() for text in typed)))


@dataclass
class Reader:
    """Types a page's commands in one folder. Commands that end in & run on until the `with` ends.

    The page's ports are exchanged for free ones: a server is told port 0, and what it says tells the port.
    """

    folder: Path
    env: dict[str, str]
    ports: dict[str, str] = field(default_factory=dict)
    children: list[Child] = field(default_factory=list)

    def __enter__(self) -> Reader:
        self._stack = ExitStack()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def type(self, command: Command) -> None:
        """Run a command; what the page shows beneath it has to come out."""
        line = _PORT.sub(lambda port: self.ports.get(port[0], "0"), command.line)
        if command.line.endswith(" &"):
            self._start(line.removesuffix(" &"), command)
            return
        out = must("bash", "-c", line, folder=self.folder, env=self.env)
        if command.output:
            assert self._as_written(out.splitlines()) == self._as_written(list(command.output)), command.line

    def _start(self, line: str, command: Command) -> None:
        child = self._stack.enter_context(Child(("bash", "-c", f"exec {line}"), self.folder, self.env))
        said = child.line(r"\d")
        own = next(port for port in _PORT.findall(command.output[0])[::-1])
        self.ports[own] = re.findall(r"\b\d{4,5}\b", said)[-1]
        assert self._as_written([said]) == [command.output[0]]
        for shown in command.output[1:]:
            child.line(re.escape(shown))
        self.children.append(child)

    def _as_written(self, lines: list[str]) -> list[str]:
        """Lines with the page's ports in the place of the real ones, and every id alike."""
        written = {real: port for port, real in self.ports.items()}
        return [_ID.sub("ID", re.sub(r"\b\d{4,5}\b", lambda port: written.get(port[0], port[0]), x)) for x in lines]
