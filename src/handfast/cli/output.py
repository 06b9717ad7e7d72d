"""What the verbs share: their common options, and how results and errors are shown."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from handfast.errors import Exit, Failure

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


def example(*lines: str) -> str:
    """The epilog of a verb: how it is used, last in its help."""
    return "Example:\n\n\b\n" + "\n".join(f"  {line}" for line in lines)


def print_json(value: object) -> None:
    """Print one JSON value on one line."""
    click.echo(json.dumps(value, default=str))


def print_error(failure: Failure, as_json: bool) -> Exit:
    """Show a failure (standard error; as JSON on standard output) and return the exit code that goes with it."""
    try:
        if as_json:
            click.echo(json.dumps(failure.as_json(), default=str))
        else:
            click.echo(f"{_red('handfast:')} {failure.message} [{failure.reason.code}]", err=True)
            if failure.hint:
                click.echo(f"  next: {failure.hint}", err=True)
    except OSError:  # nobody listens; the exit code still speaks
        pass
    return failure.reason.exit


def note(text: str) -> None:
    """Say something on standard error that is no result."""
    click.echo(text, err=True)


def _red(text: str) -> str:
    plain = os.environ.get("NO_COLOR") or not sys.stderr.isatty()
    return text if plain else click.style(text, fg="red", bold=True)
