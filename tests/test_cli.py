"""The command as a whole: what its help promises holds for every verb."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from handfast.cli.main import _run, handfast
from handfast.errors import Exit
from tests.support.certs import Ca, Leaf

# Every verb, and whether it works on an authority's state.
VERBS = {
    "up": True,
    "guard": False,
    "connect": True,
    "curl": True,
    "demo": False,
    "authority init": True,
    "authority import": True,
    "authority set": True,
    "authority show": True,
    "issue": True,
    "sign": True,
    "list": True,
    "show": True,
    "revoke": True,
    "export": True,
    "inspect": False,
    "verify": False,
    "explain": True,
    "status": False,
    "audit": True,
    "version": False,
}


def ran(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """A command in this process: its exit code, standard output and standard error."""
    capsys.readouterr()
    code = _run([str(word) for word in words])
    return int(code), *capsys.readouterr()


def command_of(verb: str) -> click.Command:
    """The click command of a verb."""
    found: click.Command = handfast
    for word in verb.split():
        assert isinstance(found, click.Group)
        below = found.get_command(click.Context(found), word)
        assert below is not None, verb
        found = below
    return found


def leaves(group: click.Group, path: str = "") -> Iterator[str]:
    """All verbs that there are below a group."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        yield from leaves(command, f"{name} ") if isinstance(command, click.Group) else [path + name]


def test_the_table_of_verbs_is_whole() -> None:
    """There is no verb that these tests do not know, and none that they only imagine."""
    assert set(leaves(handfast)) == set(VERBS)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_first_page_names_every_verb(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    """`handfast` alone and with --help show each verb with one whole sentence, and how to begin."""
    code, out, err = ran(capsys, *words)
    assert (code, err) == (Exit.OK if words else Exit.USAGE, "")
    listed = {line.split()[0]: line for line in out.partition("Commands:\n")[2].splitlines() if line.strip()}
    for verb in VERBS:
        assert listed[verb.split()[0]].endswith(".")
    assert out.rstrip().endswith("handfast up --to 127.0.0.1:8000")


@pytest.mark.parametrize("width", ["40", "80", "300"])
@pytest.mark.parametrize("verb", [*VERBS, "authority"])
def test_help_fits_and_ends_in_an_example_that_parses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str, width: str
) -> None:
    """The help of a verb is at most 100 columns wide, and its last lines are commands that the verb takes."""
    monkeypatch.setenv("COLUMNS", width)
    code, out, err = ran(capsys, *verb.split(), "--help")
    assert (code, err) == (Exit.OK, "")
    assert max(map(len, out.splitlines())) <= 100
    examples = out.partition("Example:\n")[2].split("\n")
    commands = [shlex.split(line) for line in examples if line.strip()]
    assert commands
    for words in commands:
        assert words[: 1 + len(verb.split())] == ["handfast", *verb.split()]
        if verb != "authority":
            command_of(verb).make_context(verb, words[1 + len(verb.split()) :]).close()


def test_an_example_with_a_slip_would_be_found() -> None:
    """Parsing, which the examples are put through, refuses an option that a verb does not have."""
    with pytest.raises(click.NoSuchOption):
        command_of("list").make_context("list", ["--expring", "24h"])


@pytest.mark.parametrize("verb", VERBS)
def test_common_options_are_where_they_belong(verb: str) -> None:
    """Every verb takes --json and -h; those that work on an authority take --state, and no other does."""
    command = command_of(verb)
    options = {name for option in command.params for name in option.opts}
    assert "--json" in options
    assert ("--state" in options) == VERBS[verb]
    for option in command.params:
        assert not isinstance(option, click.Option) or option.help, option


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("isue", "issue"),
        ("lst", "list"),
        ("verfy", "verify"),
        ("init", "authority init"),
        ("import", "authority import"),
    ],
)
def test_an_unknown_verb_is_answered_with_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str], word: str, meant: str
) -> None:
    """A slip in a verb is a usage error with a suggestion, in words and in JSON."""
    code, out, err = ran(capsys, word)
    assert (code, out) == (Exit.USAGE, "")
    assert err == (
        f"handfast: No such command {word!r}. Did you mean {meant!r}? [usage]\n  next: see: handfast --help\n"
    )
    code, out, _ = ran(capsys, word, "--json")
    assert (code, json.loads(out)["hint"]) == (Exit.USAGE, "see: handfast --help")
    assert "Did you mean" not in ran(capsys, "xylophone")[2]


def test_choices_are_written_as_they_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Key types, reasons, purposes and profiles are chosen by the words that help and messages use."""
    monkeypatch.setenv("HANDFAST_HOME", str(tmp_path / "state"))
    assert ran(capsys, "authority", "init", "--root-key", "ed25519", "--issuer-key", "p384")[0] == Exit.OK
    for key_type in ("p256", "p384", "ed25519", "rsa2048"):
        assert ran(capsys, "issue", key_type, "--key-type", key_type, "--out", tmp_path)[0] == Exit.OK
    leaf = ("verify", tmp_path / "p256.crt", "--bundle", tmp_path / "ca.crt")
    assert ran(capsys, *leaf, "--purpose", "client")[0] == Exit.OK
    assert ran(capsys, *leaf, "--purpose", "server")[0] == Exit.REFUSED
    assert ran(capsys, "revoke", "p256", "--reason", "key_compromise")[0] == Exit.OK
    assert json.loads(ran(capsys, "show", "p256", "--json")[1])[0]["reason"] == "key_compromise"
    assert "'key_compromise'" in ran(capsys, "revoke", "p384", "--reason", "because")[2]


def test_every_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The exit codes are those that are promised, one command for each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HANDFAST_HOME", str(tmp_path / "state"))
    assert ran(capsys, "authority", "init")[0] == 0
    assert ran(capsys, "issue", "web", "--for", "soon")[0] == 2
    assert ran(capsys, "issue", "web", "--for", "8d")[0] == 3
    assert ran(capsys, "show", "web")[0] == 4
    assert ran(capsys, "inspect", "127.0.0.1:1")[0] == 6
    (tmp_path / "state").chmod(0o755)
    assert ran(capsys, "list")[0] == 5

    def broken() -> str:
        raise RuntimeError("told in one line")

    monkeypatch.setattr("handfast.cli.look.engine_version", broken)
    code, out, err = ran(capsys, "version")
    assert (code, out) == (1, "")
    assert err.startswith("handfast: handfast failed in a way it should not: RuntimeError: told in one line [bug]\n")
    assert "Traceback" not in err
    monkeypatch.setenv("HANDFAST_DEBUG", "1")
    assert "Traceback" in ran(capsys, "version")[2]


def test_every_verb_prints_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With --json a verb's whole output is one JSON value, or one a line for `list`, with what a script needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HANDFAST_HOME", str(tmp_path / "state"))
    root = Ca.root()
    root.server().save(tmp_path, "server")
    Leaf(root.certificate, root.key).save(tmp_path, "root")
    csr = ["openssl", "req", "-new", "-key", "server.key", "-subj", "/", "-out", "server.csr"]
    subprocess.run(csr, check=True, capture_output=True)

    def printed(line: str) -> object:
        code, out, err = ran(capsys, *shlex.split(line), "--json")
        assert (code, err) == (Exit.OK, ""), line
        return json.loads(out)

    def has(line: str, *keys: str) -> dict[str, object]:
        found = printed(line)
        found = found[0] if isinstance(found, list) else found
        assert isinstance(found, dict)
        assert set(keys) <= set(found), line
        return found

    has("authority init", "trust_domain", "state", "ca", "root", "issuer")
    has("authority show", "trust_domain", "state", "ca", "root", "issuer")
    issued = has("issue web --p12 web.p12", "names", "profile", "serial", "not_after", "cert", "key", "ca", "p12")
    has("sign server.csr --name api.internal --out api.crt", "names", "serial", "cert")
    listed = [json.loads(line) for line in ran(capsys, "list", "--json")[1].splitlines()]
    assert {row["profile"] for row in listed} == {"client", "server"}
    assert has("show web", "serial", "names", "status")["serial"] == issued["serial"]
    has("inspect web.crt", "type", "names")
    has("verify web.crt --bundle ca.crt", "identity", "path", "not_after")
    has("export --pem", "pem")
    has("export --cert web.crt --key web.key --p12 again.p12", "p12", "p12_password_file")
    has("export --nginx --cert server.crt --key server.key", "nginx")
    has("revoke web", "serial", "names", "revoked_at")
    has("version", "handfast", "python", "tls_engine")
    has("authority import --cert root.crt --key root.key --state other", "trust_domain", "state", "ca")


@pytest.mark.parametrize("verb", ["version", "inspect --help", "guard --help", "--help"])
def test_verbs_that_need_no_authority_load_no_database(verb: str) -> None:
    """Such verbs start without the database library, which costs a fifth of a second."""
    program = (
        "import sys\nfrom handfast.cli.main import _run\n"
        f"code = _run({verb.split()!r})\n"
        "sys.exit(code or (99 if 'sqlalchemy' in sys.modules else 0))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done
