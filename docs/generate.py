"""Writes docs/reference from the code, so that it says what the code does. `make docs` runs it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import click

from handfast.audit.catalogue import CHECKS
from handfast.cli.main import handfast
from handfast.errors import Exit, Reason
from handfast.files import MAX_FILE
from handfast.guard.config import KEYS
from handfast.guard.service import TICK
from handfast.pki.names import Kind, Pattern, parse_name, parse_pattern
from handfast.pki.profiles import BACKDATE, PROFILES, Profile
from handfast.pki.verification import MAX_CHAIN, Identity, TrustBundle, VerifiedPeer
from handfast.policy import rules
from handfast.policy.rules import Decision, Request, parse_rule
from handfast.tls.credential import Credential
from handfast.tls.server import Channel
from handfast.wire.bodies import MAX_TRAILER
from handfast.wire.http1 import MAX_HEAD, MAX_HEADERS

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by `make docs`; change the code, not this page. -->\n"


def main() -> None:
    """Write every page, and remove what is none any more."""
    REFERENCE.mkdir(exist_ok=True)
    written = pages()
    for name, text in written.items():
        (REFERENCE / name).write_text(text)
    for path in REFERENCE.iterdir():
        if path.name not in written:
            path.unlink()


def pages() -> dict[str, str]:
    """Every page of the reference: its file name and its text."""
    made = {
        "cli.md": cli(),
        "reasons.md": reasons(),
        "profiles.md": profiles(),
        "policy.md": policy(),
        "glossary.md": glossary(),
        "configuration.md": configuration(),
        "checks.md": checks(),
    }
    return {name: f"{NOTE}\n{text.strip()}\n" for name, text in made.items()}


# The command.


def cli() -> str:
    """The help of each verb, as the command prints it."""
    parts = [
        "# The command",
        "",
        "Each verb takes `--json` for scripts and `--help` for people. An error goes to standard error in words, or,",
        "with `--json`, to standard output as one object with `error`, `message`, `hint` and `facts`.",
        "",
        "Exit codes do not change:",
        "",
        "| code | when |",
        "|---:|---|",
        *(f"| {code.value} | {_EXITS[code]} |" for code in Exit),
        "",
    ]
    for context in verbs(click.Context(handfast, None, "handfast", terminal_width=100, **handfast.context_settings)):
        parts += [f"## {context.command_path}", "", "```text", context.command.get_help(context).strip(), "```", ""]
    parts += limits()
    return "\n".join(parts)


def verbs(context: click.Context) -> Iterator[click.Context]:
    """The command and all below it, in the order of the help."""
    yield context
    command = context.command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from verbs(click.Context(below, context, name))


_EXITS = {
    Exit.OK: "it was done; for `verify`, the chain is good",
    Exit.BUG: "handfast failed in a way it should not: please report it",
    Exit.USAGE: "the command or a file given to it cannot be understood",
    Exit.REFUSED: "it was understood, and refused",
    Exit.NOT_FOUND: "there is no such file, authority or certificate",
    Exit.STORE: "the disk or the state folder: locked, full, read-only, too open, damaged",
    Exit.UNREACHABLE: "the network: cannot listen, cannot connect",
}


def limits() -> list[str]:
    """What bounds a guard and cannot be set; what can be is in the configuration."""
    rows = [
        (f"{TICK:g} s", "between two looks at revocations, renewals, files and the ends of certificates"),
        (f"{MAX_HEAD // 1024} KiB", "the head of a request"),
        (f"{MAX_HEADERS}", "header lines in it"),
        (f"{MAX_TRAILER // 1024} KiB", "the trailer of a chunked body"),
        (f"{MAX_CHAIN}", "certificates that a peer may present"),
        (f"{MAX_FILE >> 20} MiB", "a file of certificates or a key"),
    ]
    lines = ["## Limits", "", "These are the same for every guard. [Others can be set](configuration.md).", ""]
    return [*lines, "| limit | of what |", "|---:|---|", *(f"| {size} | {what} |" for size, what in rows)]


# The configuration.


def configuration() -> str:
    """Every key of handfast.toml."""
    parts = [
        "# The configuration file",
        "",
        "`handfast guard -c handfast.toml` takes these keys and no others; an unknown one is an error that names the",
        "nearest. Relative paths are below the file's folder. [How to use it](../howto/configure-the-guard.md).",
        "",
        "| key | takes | default | what it does |",
        "|---|---|---|---|",
    ]
    return "\n".join(
        parts + [f"| `{one.key}` | {_cell(one.kind)} | {_cell(one.default)} | {_cell(one.text)} |" for one in KEYS]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# The audit.


def checks() -> str:
    """Every check of `handfast audit`."""
    parts = ["# The checks of `handfast audit`", "", "Each is an attack that mutual TLS has to withstand.", ""]
    for check in CHECKS:
        parts += [
            f"## {check.id}",
            "",
            f"{check.attack} Severity: {check.severity}. {_references(check.references)}",
            "",
        ]
        parts += [f"A pass proves: {check.proves}", "", "| server | what stops it |", "|---|---|"]
        parts += [f"| {name} | {_cell(getattr(check.remedies, name))} |" for name in _SERVERS] + [""]
    return "\n".join(parts)


_SERVERS = ("handfast", "nginx", "haproxy", "envoy", "apache")


def _references(references: tuple[str, ...]) -> str:
    return f"See {', '.join(references)}." if references else ""


# The reasons.

_SECTIONS = {
    "": ("The command itself", ""),
    "input": ("What was given does not parse", ""),
    "verify": (
        "A chain does not prove what it claims",
        "A guard answers with the HTTP status. In TCP mode the client gets a TLS alert.",
    ),
    "issue": ("What may not be issued", ""),
    "store": ("The disk and the ledger", ""),
    "policy": ("Who may do what", ""),
    "http": ("HTTP between a client and the guard", ""),
    "upstream": ("The app behind the guard", "The client was let through; the app was not there or not in order."),
    "tls": ("The handshake", "Plain HTTP gets an answer in plain HTTP (400); the others get an alert or the end."),
    "ended": (
        "A connection that was good and is not any more",
        "A request on such a connection gets the status; otherwise the connection is cut.",
    ),
    "guard": ("The guard itself", ""),
    "limit": ("Too much at once", "A request gets 429; a connection is closed."),
    "proxy": ("The PROXY protocol", ""),
    "admin": ("The admin listener", ""),
    "connect": ("The connector", ""),
    "audit": ("The audit", ""),
    "seen": ("What `explain` saw", ""),
    "unreachable": ("The network", ""),
}


def reasons() -> str:
    """Every reason, by what it is about."""
    parts = [
        "# Reasons",
        "",
        "A refusal or an error has one code. It is in the log, in `--json`, and in the body of an HTTP refusal:",
        '`{"error": CODE, "id": ID}`. The ID is that of the log event, which says more. Codes do not change.',
        "Words in braces are filled in.",
        "",
    ]
    found: dict[str, list[Reason]] = {section: [] for section in _SECTIONS}
    for reason in Reason:
        found[reason.code.partition(".")[0] if reason.code.partition(".")[0] in _SECTIONS else ""].append(reason)
    for section, (title, words) in _SECTIONS.items():
        parts += [f"## {title}", "", *([words, ""] if words else [])]
        parts += ["| code | meaning | next step | exit | HTTP |", "|---|---|---|---:|---:|"]
        parts += [_reason(reason) for reason in found[section]] + [""]
    return "\n".join(parts)


def _reason(reason: Reason) -> str:
    row = reason.value
    return f"| `{row.code}` | {_cell(row.message)} | {_cell(row.hint)} | {row.exit.value} | {row.http or ''} |"


def _cell(text: str) -> str:
    """Text in a table, where a star would begin emphasis and a bar end the cell."""
    return text.replace("*", "\\*").replace("|", "\\|").replace("!r}", "}")


# The profiles.


def profiles() -> str:
    """The table of profiles, and what holds for all."""
    parts = [
        "# Profiles",
        "",
        "A profile says what may be issued. `issue` and `sign` take the last three; the first two are an authority's.",
        "",
        "| profile | what for | lifetime | at most | key use | names |",
        "|---|---|---:|---:|---|---|",
        *(_profile(profile) for profile in PROFILES.values()),
        "",
        "Key types, the default first:",
        "",
        "| profile | key types |",
        "|---|---|",
        *(f"| {profile.name} | {', '.join(profile.key_types)} |" for profile in PROFILES.values()),
        "",
        "For all of them:",
        "",
        f"- A certificate begins {BACKDATE.seconds} s before it is made, for peers whose clocks are slow.",
        "- It never ends after its issuer does, nor begins before.",
        "- Its serial has 128 random bits behind two octets that say who signed.",
        "- From a request (CSR) the public key is taken, and nothing else.",
        "- It is read back and compared with its order and profile before it is signed with the real key.",
        "- `any extended key usage` is never issued, and does not count when a chain is judged.",
    ]
    return "\n".join(parts)


def _profile(profile: Profile) -> str:
    if profile.ca:
        below = "no authority" if profile.path_length == 0 else f"{profile.path_length} level of authorities"
        use = f"signs; {below} below it"
    else:
        use = " and ".join(word for word, on in (("server", profile.server), ("client", profile.client)) if on)
    kinds = ", ".join(str(kind) for kind in Kind if kind in profile.kinds)
    lifetime, most = _span(profile.lifetime), _span(profile.max_lifetime)
    return f"| {profile.name} | {profile.purpose} | {lifetime} | {most} | {use} | {kinds} |"


def _span(span: timedelta) -> str:
    return f"{span.days} days" if span.days > 1 else f"{int(span.total_seconds() // 3600)} h"


# The policy.

_DOMAIN = "handfast.internal"
_WHO = (
    ("web", "web", True),
    ("web", "web/eu", False),
    ("web/*", "web/eu", True),
    ("web/*", "web/eu/1", False),
    ("web/**", "web/eu/1", True),
    ("web/**", "web", False),
    ("spiffe://handfast.internal/**", "web", True),
    ("spiffe://handfast.internal/**", "spiffe://elsewhere.example/web", False),
    ("*.internal", "dns:api.internal", True),
    ("dns:*.internal", "dns:a.b.internal", False),
    ("dns:**.internal", "dns:a.b.internal", True),
    ("email:*@corp.example", "email:ann@corp.example", True),
    ("ip:10.0.0.0/8", "ip:10.1.2.3", True),
    ("cn:client", "cn:client", True),
    ("web", "cn:web", False),
    ("any", "cn:client", True),
)
_WHAT = (
    ("any GET,HEAD", "GET", "/x", True),
    ("any GET,HEAD", "POST", "/x", False),
    ("any /public", "GET", "/public", True),
    ("any /public", "GET", "/public/", False),
    ("any /public/*", "GET", "/public/a", True),
    ("any /public/*", "GET", "/public/a/b", False),
    ("any /public/**", "GET", "/public/a/b", True),
    ("any /public/**", "GET", "/public", True),
    ("any /public/**", "GET", "/publication", False),
    ("any /public/*/**", "GET", "/public/a", True),
    ("any /public/*/**", "GET", "/public/", False),
    ("any /public/**", "GET", "/Public/a", False),
)


def policy() -> str:
    """The grammar, from the module that reads it, and examples that it has judged."""
    grammar = inspect.cleandoc(rules.__doc__ or "").partition("\n\n")[2].partition("\n\nA path")[0]
    parts = [
        "# The policy",
        "",
        "Rules say who may do what. They are given with `--allow`, once for each; the first that fits decides, and",
        "where none fits the answer is no. A rule without `allow` or `deny` in front allows.",
        "",
        "```text",
        inspect.cleandoc(grammar),
        "```",
        "",
        "## Names",
        "",
        _prose(parse_name),
        "",
        "## Patterns",
        "",
        _prose(parse_pattern).replace("what `parse_name` takes", "a name as above"),
        "",
        _prose(Pattern),
        "",
        f"With `up`, or where the trust domain is known (here {_DOMAIN}), this is who is meant:",
        "",
        "| rule's WHO | a peer named | meant |",
        "|---|---|---|",
        *(_who(*row) for row in _WHO),
        "",
        "A rule may name any of the peer's names: those in the certificate, its common name as `cn:`, and the SHA-256",
        "of the certificate as `sha256:`.",
        "",
        "## Authorities",
        "",
        "Where a site believes several, `by` says which one must vouch: `any by staff`, `cn:admin by partners GET`.",
        "Their names are those of `client_ca = { staff = FILE, partners = FILE }` or `--client-ca staff=FILE`. A rule",
        "without `by` takes its name from any of them.",
        "",
        "## Methods and paths",
        "",
        "| rule | request | covered |",
        "|---|---|---|",
        *(_what(*row) for row in _WHAT),
        "",
        "A path is judged on exactly the bytes that are forwarded, without the query. Once any rule names a path, a",
        "path that can be read in two ways (`//`, `/../`, `%2f`, `;` and the like) is refused with",
        "`http.ambiguous_path`.",
        "",
        "A whole TCP connection is allowed only by a rule that names neither methods nor a path.",
    ]
    return "\n".join(parts)


def _who(who: str, peer: str, meant: bool) -> str:
    name = parse_name(peer, _DOMAIN)
    assert parse_pattern(who, _DOMAIN).matches(name) is meant, (who, peer)
    return f"| `{who}` | `{name}` | {'yes' if meant else 'no'} |"


def _what(rule: str, method: str, path: str, covered: bool) -> str:
    assert parse_rule(rule).covers(Request(method.encode(), path.encode())) is covered, (rule, method, path)
    return f"| `{rule}` | `{method} {path}` | {'yes' if covered else 'no'} |"


def _prose(thing: object) -> str:
    """A docstring without its first line, which is for those who read the code."""
    return (inspect.getdoc(thing) or "").partition("\n\n")[2]


# The words.

_WORDS: dict[str, object] = {
    "authority": "Who issues certificates. Ours is a root, an issuer and a ledger of what was issued, in one folder. In"
    " a chain: each certificate that may sign others.",
    "issuer": "A signing certificate and its key. It signs leaves; the root signs the issuer.",
    "leaf": "A workload's or a person's certificate: one that may sign nothing.",
    "trust bundle": TrustBundle,
    "identity": Identity,
    "name": "One entry of a certificate's subject alternative name, with its kind: "
    + ", ".join(str(kind) for kind in Kind)
    + ".",
    "pattern": Pattern,
    "SVID": "A leaf whose only URI name is a SPIFFE ID.",
    "trust domain": f"The part of a SPIFFE ID that says whose it is: `{_DOMAIN}` in `spiffe://{_DOMAIN}/web`.",
    "profile": "What may be issued: for which use, with which names and keys, and for how long.",
    "order": "One request for a certificate, held against its profile.",
    "authorization": "The proof that one order may be filled, once.",
    "ledger": "The database of an authority: what it issued, what it was about to issue, what it revoked.",
    "peer": "The other end of a connection, before it is verified. Also a profile, for who serves and calls.",
    "client, server": "Who opens a connection, and who takes it.",
    "connector": "What opens a plain local port and speaks mutual TLS to the far side.",
    "site": "A server certificate of a listener, with the names it answers to, who may come in by it, and its routes.",
    "route": "Where requests of some paths and methods go, and who may make them.",
    "rule": "One line of a policy: who may, or may not, do what.",
    "state folder": "Where an authority keeps its keys, its ledger and its clients' files.",
    "worker": "One of several processes of a guard that share its listeners.",
    "reload": "To take files that have changed, while connections go on.",
    "hand-over": "To give the listening sockets to a new process, which goes on where the old one ends.",
    "assertion": "A signed token that tells the app who called, and that the call came through the guard.",
    "revocation list": "A signed list of certificates that an authority has taken back (CRL, RFC 5280).",
    "verified peer": VerifiedPeer,
    "credential": Credential,
    "channel": Channel,
    "guard": "What listens, verifies clients, decides, and forwards to the app.",
    "listener, upstream": "The guard's two sides: where clients connect, and the app.",
    "target": "The app, as `--to` names it: `HOST:PORT` or `unix:PATH`, or with `http://`, `https://`, `h2c://`,"
    " `h2://`, `tcp://`, `tls://` or `tcp+unix:` before it.",
    "snapshot": "Credential, trust bundle, revocations and policy of a guard, swapped as one value.",
    "decision": Decision,
    "reason": "The stable code of a refusal or an error.",
}


def glossary() -> str:
    """The words of the project; where a class stands for one, what the class says of itself."""
    parts = ["# Words", "", "| word | meaning |", "|---|---|"]
    for word, meaning in _WORDS.items():
        text = meaning if isinstance(meaning, str) else _first_sentences(meaning)
        parts.append(f"| {word} | {text} |")
    return "\n".join(parts)


def _first_sentences(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    main()
