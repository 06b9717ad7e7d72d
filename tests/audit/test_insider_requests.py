"""Requests that say something else than the certificate: each check finds its hole, and a guard has none."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import pytest

from handfast.audit.insider_requests import CHECKS, MARK, echoed
from handfast.audit.model import Check, Verdict
from handfast.audit.oracle import End, Reply
from handfast.audit.runner import Means
from handfast.policy import parse_policy
from handfast.testing import TestAuthority, TestLeaf
from tests.audit.insider_kit import FORBIDDEN, answer, application, echo, found_at, path_of, proxy
from tests.audit.kit import nginx_with
from tests.support.apps import App, echo_head
from tests.support.certs import Ca
from tests.support.guards import Running

OURS = b"X-Client-Name"
NAME = b"X-Client-Name: spiffe://test/web\r\n"


@pytest.fixture
def known(authority: TestAuthority, client: TestLeaf) -> Means:
    return Means(client, authority)


# Hosts.


def test_a_host_that_is_not_the_server_name(authority: TestAuthority, known: Means, tmp_path: Path) -> None:
    """nginx's default server takes any Host over any server name."""
    with nginx_with(authority, tmp_path, "ssl_verify_client on;") as port:
        finding = found_at("insider.other-host", port, known)
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome


def test_a_host_that_the_proxy_does_not_have(authority: TestAuthority, known: Means, tmp_path: Path) -> None:
    """A proxy's own 404 is no hole: with an echo that is seen, and without one it is left open."""

    def known_host(head: bytes) -> bytes:
        ours = b"\r\nHost: localhost\r\n" in head and b" https://" not in head
        return head if ours else answer(b"no such host", "404 Not Found")

    with application(echo) as app, proxy(authority, tmp_path, app, known_host) as port:
        told = found_at("insider.other-host", port, known, echo="/echo")
        untold = found_at("insider.other-host", port, known)
    assert told.outcome.verdict is Verdict.PASS, told.outcome
    assert untold.outcome.verdict is Verdict.INCONCLUSIVE, untold.outcome
    with application(echo) as app, proxy(authority, tmp_path, app) as port:
        hole = found_at("insider.other-host", port, known, echo="/echo")
    assert hole.outcome.verdict is Verdict.FAIL, hole.outcome


@pytest.mark.parametrize("check", ["other-host", "other-authority"])
def test_nginx_can_be_told(authority: TestAuthority, known: Means, tmp_path: Path, check: str) -> None:
    """nginx as our remedy has it beats it back."""
    lines = ("ssl_verify_client on;", "if ($ssl_server_name != $host) { return 421; }")
    with nginx_with(authority, tmp_path, *lines, listen="ssl http2") as port:
        finding = found_at(f"insider.{check}", port, known)
    assert finding.outcome.verdict is Verdict.PASS, finding.outcome


def test_an_authority_that_is_not_the_server_name(authority: TestAuthority, known: Means, tmp_path: Path) -> None:
    """Over HTTP/2 nginx does the same; without HTTP/2 there is nothing to try."""
    with nginx_with(authority, tmp_path, "ssl_verify_client on;", listen="ssl http2") as port:
        finding = found_at("insider.other-authority", port, known)
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert finding.outcome.evidence[0].received.startswith("HTTP/2 200")
    (tmp_path / "plain").mkdir()
    with nginx_with(authority, tmp_path / "plain", "ssl_verify_client on;") as port:
        finding = found_at("insider.other-authority", port, known)
    assert finding.outcome.verdict is Verdict.NOT_APPLICABLE


# Identity headers.


def without(pattern: bytes) -> Callable[[bytes], bytes]:
    """Removes lines that fit, and then sets our own header: what each careless proxy forgets is in the pattern."""

    def rewrite(head: bytes) -> bytes:
        lines, rest = head.partition(b"\r\n")[::2]
        return lines + b"\r\n" + re.sub(pattern, b"", rest)[:-2] + NAME + b"\r\n"

    return rewrite


def listed_is_removed(head: bytes) -> bytes:
    """Removes what Connection names after setting our own header (CVE-2022-31813)."""
    head = without(EVERY)(head)
    named = re.search(rb"(?im)^connection:(.*)\r$", head)
    for name in named[1].split(b",") if named else ():
        head = re.sub(rb"(?im)^" + re.escape(name.strip()) + rb":.*\r\n", b"", head)
    return head


EVERY = rb"(?im)^[\0-\x20]*x[-_.]client[-_.]name[\0-\x20]*:.*\r\n(?:[ \t].*\r\n)*"


@pytest.mark.parametrize(
    ("rewrite", "shown"),
    [
        (without(rb"^(?!)"), "X-Client-Name"),
        (without(rb"(?m)^X-Client-Name:.*\r\n"), "x-client-name"),
        (without(rb"(?im)^x-client-name:.*\r\n"), "x_client_name"),
        (without(rb"(?im)^x[-_]client[-_]name:.*\r\n"), "x.client.name"),
        (without(rb"(?im)^x[-_.]client[-_.]name:.*\r\n"), "a space before the colon"),
        (without(rb"(?im)^x[-_.]client[-_.]name[ \t]*:.*\r\n"), "a NUL before the colon"),
        (without(EVERY), "behind a bare CR"),
        (listed_is_removed, "Connection: close, X-Client-Name"),
    ],
    ids=["everything", "exact", "underscore", "dot", "space", "nul", "bare-cr", "listed"],
)
def test_a_spelling_that_gets_through(
    authority: TestAuthority, known: Means, tmp_path: Path, rewrite: Callable[[bytes], bytes], shown: str
) -> None:
    """A proxy that forgets one spelling hands on the client's own word for who it is."""
    with application(echo) as app, proxy(authority, tmp_path, app, rewrite) as port:
        finding = found_at("insider.spoofed-headers", port, known, echo="/echo")
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert shown in " ".join(item.sent for item in finding.outcome.evidence)


def test_a_trailer_that_becomes_a_header(authority: TestAuthority, known: Means, tmp_path: Path) -> None:
    """An application that takes trailers for headers is told who the client is by the client."""

    def rewrite(head: bytes) -> bytes:
        named = re.search(rb"(?im)^trailer: (.*)\r$", head)
        made = without(EVERY)(head)
        return made[:-2] + named[1] + b": " + MARK.encode() + b"\r\n\r\n" if named else made

    with application(echo) as app, proxy(authority, tmp_path, app, rewrite) as port:
        finding = found_at("insider.spoofed-headers", port, known, echo="/echo")
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert "X-Client-Name in a trailer" in [item.sent for item in finding.outcome.evidence]


def test_no_identity_is_no_case(authority: TestAuthority, known: Means, tmp_path: Path) -> None:
    """Where the application is told of no client, none can be spoofed; where the echo is none, nothing is shown."""
    with application(echo) as app, proxy(authority, tmp_path, app) as port:
        told_nothing = found_at("insider.spoofed-headers", port, known, echo="/echo")
    (tmp_path / "nginx").mkdir()
    with nginx_with(authority, tmp_path / "nginx", "ssl_verify_client on;") as port:
        no_echo = found_at("insider.spoofed-headers", port, known, echo="/echo")
    assert told_nothing.outcome.verdict is Verdict.NOT_APPLICABLE, told_nothing.outcome
    assert no_echo.outcome.verdict is Verdict.INCONCLUSIVE, no_echo.outcome


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ("GET / HTTP/1.1\r\nA: 1\r\nB: 2", [("A", "1"), ("B", "2")]),
        ('{"headers": {"A": "1", "B": ["2", "3"]}}', [("A", "1"), ("B", "2"), ("B", "3")]),
        ('[["A", "1"], ["B", "2"]]', [("A", "1"), ("B", "2")]),
        ("A: 1\nB: 2\rC: 3", [("A", "1"), ("B", "2"), ("C", "3")]),
        ("Hello World", []),
        ("17", []),
    ],
)
def test_echoes_are_read(body: str, headers: list[tuple[str, str]]) -> None:
    """Echoes come as the head itself, or in JSON; what is neither tells nothing."""
    assert echoed(Reply(True, answer(body.encode()), End.OPEN)) == headers


# Paths.


def plainly(path: str) -> str:
    return path


def decoded(path: str) -> str:
    return unquote(path)


def merged(path: str) -> str:
    return re.sub("/+", "/", path)


def resolved(path: str) -> str:
    return posixpath.normpath(path).replace("//", "/")


def resolved_decoded(path: str) -> str:
    return resolved(unquote(path))


def folded(path: str) -> str:
    return path.lower()


def without_parameters(path: str) -> str:
    return re.sub(";[^/]*", "", path)


def windows(path: str) -> str:
    return resolved(unquote(path).replace("\\", "/"))


def cut_at_nul(path: str) -> str:
    return unquote(path).partition("\0")[0]


def twice_decoded(path: str) -> str:
    return unquote(unquote(path))


def without_slash(path: str) -> str:
    return path.rstrip("/")


def of_any_host(path: str) -> str:
    return re.sub("^https?://[^/]*", "", path)


def deny(head: bytes) -> bytes:
    """The rule of a proxy that compares the path as it was written."""
    return FORBIDDEN if path_of(head) == "/admin" else head


def site(normal: Callable[[str], str], everything: bool = False) -> Callable[[bytes], bytes]:
    """An application with a public page and one for the admin, by its own idea of a path."""

    def respond(head: bytes) -> bytes:
        path = normal(path_of(head))
        if path == "/admin":
            return answer(b"the admin's page")
        return answer(b"the public page") if path == "/" or everything else answer(b"no", "404 Not Found")

    return respond


@pytest.mark.parametrize(
    "normal",
    [
        *(decoded, merged, resolved, resolved_decoded, folded, without_parameters, windows, cut_at_nul),
        *(twice_decoded, without_slash, of_any_host),
    ],
)
@pytest.mark.parametrize("everything", [False, True], ids=["strict", "catch-all"])
def test_an_application_with_other_paths(
    authority: TestAuthority, known: Means, tmp_path: Path, normal: Callable[[str], str], everything: bool
) -> None:
    """A rule on the path as written, before an application that reads it otherwise, is no rule."""
    with application(site(normal, everything)) as app, proxy(authority, tmp_path, app, deny) as port:
        finding = found_at("insider.path-confusion", port, known, protected="/admin")
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome


def test_a_header_that_changes_the_path(authority: TestAuthority, known: Means, tmp_path: Path) -> None:
    """An application that takes the path from X-Original-URL goes around any rule on the request line."""

    def respond(head: bytes) -> bytes:
        other = re.search(rb"(?im)^x-original-url: (.*)\r$", head)
        return site(plainly)(b"GET %s HTTP/1.1\r\n\r\n" % other[1] if other else head)

    def strict(head: bytes) -> bytes:
        return head if path_of(head) == "/" else FORBIDDEN

    with application(respond) as app, proxy(authority, tmp_path, app, strict) as port:
        finding = found_at("insider.path-confusion", port, known, protected="/admin")
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert "X-Original-URL" in finding.outcome.evidence[0].sent


def test_a_method_that_the_rule_forgot(authority: TestAuthority, known: Means, tmp_path: Path) -> None:
    """A rule for GET alone lets HEAD and POST through."""

    def rule(head: bytes) -> bytes:
        return (
            head
            if path_of(head) == "/" or (path_of(head) == "/admin" and head[:4] in (b"POST", b"HEAD"))
            else FORBIDDEN
        )

    with application(site(plainly)) as app, proxy(authority, tmp_path, app, rule) as port:
        finding = found_at("insider.path-confusion", port, known, protected="/admin")
    assert finding.outcome.verdict is Verdict.FAIL, finding.outcome
    assert finding.outcome.why == "the protected path was answered to another method"


def test_a_path_that_is_not_protected(authority: TestAuthority, known: Means, tmp_path: Path) -> None:
    """What the client may reach anyway is a finding of its own."""
    with application(site(plainly)) as app, proxy(authority, tmp_path, app) as port:
        finding = found_at("insider.path-confusion", port, known, protected="/admin")
    assert finding.outcome.why == "/admin is not protected at all"


@pytest.mark.parametrize("everything", [False, True], ids=["strict", "catch-all"])
def test_a_rule_and_an_application_that_agree(
    authority: TestAuthority, known: Means, tmp_path: Path, everything: bool
) -> None:
    """Where every other spelling is another path, or is refused, the check passes."""

    def rule(head: bytes) -> bytes:
        written = path_of(head)
        plain = re.fullmatch("/|(/[a-z-]+)+", written) is not None
        return head if plain and written != "/admin" else FORBIDDEN

    with application(site(plainly, everything)) as app, proxy(authority, tmp_path, app, rule) as port:
        finding = found_at("insider.path-confusion", port, known, protected="/admin")
    assert finding.outcome.verdict is Verdict.PASS, finding.outcome


# A guard.


@contextmanager
def guarded(authority: TestAuthority, tls12: bool) -> Iterator[int]:
    ca = Ca(authority.certificate, authority.key)
    rules = parse_policy(["deny any /admin", "deny any /admin/**", "allow any"])
    with App(echo_head) as app, Running(ca, app.address, rules, tls12=tls12) as guard:
        yield int(guard.address.rpartition(":")[2])


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_a_guard_holds(authority: TestAuthority, known: Means, check: Check) -> None:
    """A guard before an echo beats all of it back."""
    with guarded(authority, tls12=False) as port:
        finding = found_at(check.id, port, known, echo="/echo", protected="/admin")
    right = (Verdict.PASS, Verdict.NOT_APPLICABLE) if check.id.endswith("other-authority") else (Verdict.PASS,)
    assert finding.outcome.verdict in right, finding.outcome


def test_every_check_has_a_server_with_its_hole() -> None:
    """No check of this theme is left out above."""
    tried = {"other-host", "other-authority", "spoofed-headers", "path-confusion"}
    assert {f"insider.{check}" for check in tried} == {check.id for check in CHECKS}
