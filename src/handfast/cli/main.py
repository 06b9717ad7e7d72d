"""The entry point: which verbs there are, and how every error leaves the program."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
import warnings
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from handfast.cli.output import print_error
from handfast.errors import Exit, Failure, HandfastError, Reason, StoreError, VerificationFailed

# Verb -> where it lives, and what it does. A verb's module is imported only when the verb is called: neither
# `version` nor the list of verbs need load a database.
_VERBS = {
    "up": ("up", "Guard an app: authority, certificates and all."),
    "guard": ("guard", "Guard an app with certificates you have."),
    "connect": ("connect", "Call a server: a plain local port that speaks mutual TLS."),
    "curl": ("connect", "Run curl with our certificate."),
    "demo": ("demo", "See it work: an app, a guard, and who gets through."),
    "authority": ("authority", "Make, import or show the authority."),
    "issue": ("certificates", "Make a key and a certificate."),
    "sign": ("certificates", "Sign a request made elsewhere."),
    "list": ("certificates", "List the certificates in use."),
    "show": ("certificates", "Show a certificate by its serial or name."),
    "revoke": ("certificates", "Revoke a certificate."),
    "export": ("export", "Write certificates in other forms: PKCS#12, PEM, an nginx block."),
    "inspect": ("look", "Show what a certificate, key, request or server holds."),
    "explain": ("explain", "Show a handshake step by step, and whose fault a failure is."),
    "verify": ("look", "Say whether a certificate proves what it claims, and if not, why."),
    "status": ("status", "Show what a running guard does, live."),
    "audit": ("audit", "Attack a mutual-TLS server that is yours, and report what holds."),
    "version": ("look", "Show versions, TLS engine included."),
}
# What people type for a verb that has another name here.
_MEANT = {"init": "authority init", "import": "authority import", "ca": "authority", "serve": "up", "ls": "list"}

_OWN_KEY = "give its passphrase with --key-passphrase-file F"
# The next step where a verb's own options are it, instead of the table's.
_HINTS = {
    ("handfast authority import", Reason.INPUT_KEY_ENCRYPTED): _OWN_KEY,
    ("handfast authority import", Reason.INPUT_WRONG_PASSPHRASE): _OWN_KEY,
    ("handfast connect", Reason.INPUT_KEY_ENCRYPTED): _OWN_KEY,
    ("handfast connect", Reason.INPUT_WRONG_PASSPHRASE): _OWN_KEY,
    ("handfast export", Reason.INPUT_KEY_ENCRYPTED): _OWN_KEY,
    ("handfast export", Reason.INPUT_WRONG_PASSPHRASE): _OWN_KEY,
    ("handfast guard", Reason.INPUT_KEY_ENCRYPTED): _OWN_KEY,
    ("handfast guard", Reason.INPUT_WRONG_PASSPHRASE): _OWN_KEY,
    ("handfast inspect", Reason.INPUT_NOT_P12): "give its password with --password-file F",
    ("handfast issue", Reason.STORE_EXISTS): "write elsewhere with --out DIR, or replace it with --force",
    ("handfast sign", Reason.STORE_EXISTS): "write elsewhere with --out FILE, or replace it with --force",
}
# What the system says when our output, or a file, takes no more.
_FULL_OR_BROKEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF})


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"handfast.cli.{_VERBS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, sentence) for verb, (_, sentence) in _VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if word not in _VERBS and not word.startswith("-"):
            near = [_MEANT[word]] if word in _MEANT else get_close_matches(word, _VERBS, 1)
            ctx.fail(f"No such command {word!r}." + "".join(f" Did you mean {verb!r}?" for verb in near))
        return super().resolve_command(ctx, args)


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
    _hold_standard_streams()
    code = _run(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try once more at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run(words: list[str]) -> int:
    try:
        result: Any = handfast.main(args=words, prog_name="handfast", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else Exit.OK
    except click.exceptions.NoArgsIsHelpError as help_text:
        click.echo(help_text.format_message())
        return Exit.USAGE
    except click.UsageError as error:
        return _fail(_usage(error, words), words)
    except VerificationFailed as error:
        return _fail(error.failure, words, error.failures[1:])
    except HandfastError as error:
        return _fail(error.failure, words)
    except (click.Abort, KeyboardInterrupt):
        return _fail(Failure(Reason.INTERRUPTED), words)
    except (BrokenPipeError, SystemExit):  # whoever read our output has gone, as `head` does; click turns one into
        return Exit.OK  # the other
    except Exception as bug:
        if os.environ.get("HANDFAST_DEBUG"):
            traceback.print_exc()
        detail = f"{type(bug).__name__}: {bug}"[:300]
        return _fail(_of_the_disk(bug) or Failure(Reason.BUG, {"detail": detail}), words)


def _fail(failure: Failure, words: list[str], also: tuple[Failure, ...] | None = None) -> Exit:
    """Show a failure with a next step, and return its exit code."""
    verb = _verb(words)
    hint = _HINTS.get((verb, failure.reason), failure.hint)
    if not hint and failure.reason is not Reason.INTERRUPTED:
        hint = f"see: {verb} --help"
    return print_error(failure, "--json" in words, hint, also)


def _verb(words: list[str]) -> str:
    known = ["handfast", *words[:1]] if words and words[0] in _VERBS else ["handfast"]
    if known[-1] == "authority" and words[1:2] and words[1] in ("init", "import", "set", "show"):
        known.append(words[1])
    return " ".join(known)


def _usage(error: click.UsageError, words: list[str]) -> Failure:
    path = error.ctx.command_path if error.ctx else _verb(words)  # what the parser finds has no context
    return Failure(Reason.USAGE, {"detail": error.format_message(), "help": f"see: {path} --help"})


def _of_the_disk(error: Exception) -> Failure | None:
    """What the system does to a file that no room looks after, standard output among them; None if it is a bug."""
    from handfast.files import disk_errors

    if not isinstance(error, OSError) or (error.filename is None and error.errno not in _FULL_OR_BROKEN):
        return None
    try:
        with disk_errors(Path(str(error.filename or "standard output"))):
            raise error
    except StoreError as found:
        return found.failure


def _hold_standard_streams() -> None:
    """Fill standard streams that are closed with nothing: the next file opened, say the ledger, would get their
    numbers, and what is meant for the screen would be written into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115  # as long as the process
    with suppress(AttributeError):  # a stream put there by someone else
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # paths are bytes; show them
