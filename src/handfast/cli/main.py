"""The entry point: which verbs there are, and how every error leaves the program."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from typing import Any

import click

from handfast.cli.output import print_error
from handfast.errors import Exit, Failure, HandfastError, Reason

# Verb -> where it lives. A verb's module is imported only when it is called: `version` need not load a database.
_VERBS = {
    "up": "handfast.cli.serve",
    "guard": "handfast.cli.serve",
    "demo": "handfast.cli.demo",
    "authority": "handfast.cli.authority",
    "issue": "handfast.cli.certificates",
    "sign": "handfast.cli.certificates",
    "list": "handfast.cli.certificates",
    "show": "handfast.cli.certificates",
    "revoke": "handfast.cli.certificates",
    "export": "handfast.cli.export",
    "inspect": "handfast.cli.look",
    "verify": "handfast.cli.look",
    "version": "handfast.cli.look",
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        command: click.Command = getattr(importlib.import_module(_VERBS[cmd_name]), f"{cmd_name}_")
        return command


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example:\n\n\b\n  python3 -m http.server 8000 --bind 127.0.0.1 &\n  handfast up --to 127.0.0.1:8000",
)
def handfast() -> None:
    """Mutual TLS from end to end: guard an app, issue identities, see who is refused and why."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with a stable code (errors.Exit). No traceback reaches the user."""
    warnings.simplefilter("ignore")  # what libraries tell developers is nothing to a user
    words = sys.argv[1:] if arguments is None else arguments
    sys.exit(_run(words))


def _run(words: list[str]) -> int:
    as_json = "--json" in words
    try:
        result: Any = handfast.main(args=words, prog_name="handfast", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else Exit.OK
    except click.exceptions.NoArgsIsHelpError as help_text:
        click.echo(help_text.format_message())
        return Exit.USAGE
    except click.UsageError as error:
        return print_error(_usage(error), as_json)
    except HandfastError as error:
        return print_error(error.failure, as_json)
    except (click.Abort, KeyboardInterrupt):
        return print_error(Failure(Reason.INTERRUPTED), as_json)
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except Exception as bug:
        if os.environ.get("HANDFAST_DEBUG"):
            traceback.print_exc()
        return print_error(Failure(Reason.BUG, {"detail": f"{type(bug).__name__}: {bug}"}), as_json)


def _usage(error: click.UsageError) -> Failure:
    path = error.ctx.command_path if error.ctx else "handfast"
    return Failure(Reason.USAGE, {"detail": error.format_message(), "help": f"see: {path} --help"})
