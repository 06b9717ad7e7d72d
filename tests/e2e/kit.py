"""What the end-to-end tests share: the command called in this process, and what every refusal looks like."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from handfast.cli.main import _run
from handfast.errors import Exit

Words = tuple[str | Path, ...]
Call = Callable[..., "Outcome"]

_REFUSAL = re.compile(r"handfast: [^\n]+ \[([a-z0-9_.]+)\]\n(  also: [^\n]+ \[[a-z0-9_.]+\]\n)*  next: [^\n]+\n")


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its one JSON value."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Caller:
    """Calls the command in this process, past the interpreter's start, which is most of what a child costs."""

    capture: pytest.CaptureFixture[str]

    def __call__(self, *words: str | Path) -> Outcome:
        self.capture.readouterr()
        code = _run([str(word) for word in words])
        out, err = self.capture.readouterr()
        assert "Traceback" not in out + err
        return Outcome(int(code), out, err)

    def done(self, *words: str | Path) -> Any:
        """What a command that has to succeed prints with --json."""
        outcome = self(*words, "--json")
        assert outcome.code == Exit.OK, outcome
        return outcome.json

    def refused(self, *words: str | Path) -> tuple[int, str]:
        """The exit code and the reason of a command that has to fail, as words and as JSON."""
        spoken = self(*words)
        check_refusal(spoken)
        as_json = self(*words, "--json")
        assert as_json.code == spoken.code
        error = as_json.json
        assert error["message"]
        assert error["hint"]
        assert "handfast:" not in as_json.err
        return spoken.code, error["error"]


def check_refusal(outcome: Outcome) -> str:
    """See that a failure is one line with its code and a next step, and nothing on standard output; the reason."""
    assert outcome.code not in (Exit.OK, Exit.BUG), outcome
    notes = re.sub(r"^(note:|made an authority| {2}its keys| {6}its certificate).*\n", "", outcome.err, flags=re.M)
    found = _REFUSAL.fullmatch(notes)
    assert found, outcome
    assert not outcome.out
    return found[1]


def copy_state(state: Path, place: Path) -> Path:
    """A copy of a state folder whose ledger nobody has open."""
    place.mkdir(mode=0o700, exist_ok=True)
    for file in state.iterdir():
        shutil.copy2(file, place / file.name)
    return place


def serials(state: Path) -> set[str]:
    """All that was ever begun in a ledger, as the database itself has it."""
    with closing(sqlite3.connect(state / "ledger.db")) as ledger:
        return {row[0] for row in ledger.execute("SELECT serial FROM intents")}
