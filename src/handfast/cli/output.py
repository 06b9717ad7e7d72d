"""What the verbs share: their common options, and how results and errors are shown."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import click

from handfast.errors import Exit, Failure, InvalidInput, Reason
from handfast.files import read_file

F = TypeVar("F", bound=Callable[..., Any])

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
state_option = click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=None,
    help="The authority's folder.  [default: $HANDFAST_HOME, else the XDG data folder]",
)
passphrase_option = click.option(
    "--passphrase-file",
    type=click.Path(path_type=Path),
    default=None,
    help="Read the authority's passphrase from this file. HANDFAST_PASSPHRASE does the same.",
)


key_passphrase_option = click.option(
    "--key-passphrase-file",
    type=click.Path(path_type=Path),
    default=None,
    help="What opens the private key, if it is encrypted.",
)


def choice(values: Iterable[StrEnum]) -> click.Choice[str]:
    """A choice among the values of an enum; click itself would take its members' names."""
    return click.Choice([one.value for one in values])


def first_line(path: Path) -> bytes:
    """The passphrase or password in a file: its first line, without the line's end. Raises InvalidInput."""
    return read_file(path, "passphrase file").partition(b"\n")[0].removesuffix(b"\r")


def asked(question: str, *, confirm: bool = False) -> bytes:
    """Ask a person for a passphrase. Raises InvalidInput (INPUT_NO_PASSPHRASE) where nobody is there."""
    if not sys.stdin.isatty():
        raise InvalidInput(Reason.INPUT_NO_PASSPHRASE)
    answer: str = click.prompt(question, hide_input=True, confirmation_prompt=confirm, err=True)
    return answer.encode("utf-8", "surrogateescape")


def example(*lines: str) -> str:
    """The epilog of a verb: how it is used, last in its help."""
    return "Example:\n\n\b\n" + "\n".join(f"  {line}" for line in lines)


def print_json(value: object) -> None:
    """Print one JSON value on one line."""
    click.echo(json.dumps(value, default=str))


def print_error(failure: Failure, as_json: bool, hint: str, also: Sequence[Failure] | None = None) -> Exit:
    """Show a failure (standard error; as JSON on standard output) and return the exit code that goes with it.

    `hint` is the next step, `also` what else is wrong.
    """
    if as_json:
        told = failure.as_json() | {"hint": hint}
        if also is not None:
            told["also"] = [other.as_json() for other in also]
        try:
            print_json(told)
            return failure.reason.exit
        except OSError:  # it goes nowhere; perhaps the other stream does
            pass
    note(f"{_red('handfast:')} {_line(failure)}")
    for other in also or ():
        note(f"  also: {_line(other)}")
    if hint:
        note(f"  next: {_printable(hint)}")
    return failure.reason.exit


def note(text: str) -> None:
    """Say something on standard error that is no result. If nobody can hear it, the exit code still speaks."""
    with suppress(OSError):
        click.echo(text, err=True)


def _line(failure: Failure) -> str:
    return f"{_printable(failure.message)} [{failure.reason.code}]"


def _printable(text: str) -> str:
    """On one line, without what would move a terminal's cursor: file names may hold anything."""
    spaced = " ".join(text.split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in spaced)


def _red(text: str) -> str:
    plain = os.environ.get("NO_COLOR") or not sys.stderr.isatty()
    return text if plain else click.style(text, fg="red", bold=True)
