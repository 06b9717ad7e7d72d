"""OCSP for clients: who is asked, what of it is believed, and that nobody comes in against the policy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.ocsp import (
    OCSPCertStatus,
    OCSPResponderEncoding,
    OCSPResponseBuilder,
    OCSPResponseStatus,
    load_der_ocsp_request,
)
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID

from handfast.errors import InvalidInput, Reason
from handfast.guard.assembly import Assembly
from handfast.guard.config import parse_config
from handfast.guard.ocsp import MAX_OPEN, OcspChecker, Verdict, is_public
from handfast.guard.routes import Sites, Snapshot
from handfast.guard.schema import Ocsp
from handfast.pki.verification import Purpose, Terms, TrustBundle, VerifiedPeer, verify
from handfast.tls.judge import judge_offline
from tests.guard.conftest import Ask
from tests.support.apps import HELLO, App, accepted, client_context, get, stop_accepting
from tests.support.certs import Ca, Leaf
from tests.support.guards import Running
from tests.support.programs import HANDFAST, Child, curl
from tests.support.waiting import PATIENCE as WAIT
from tests.support.waiting import until

LOOPBACK = frozenset({"127.0.0.1"})
BOTH = (Ocsp.REQUIRE, Ocsp.ALLOW_UNREACHABLE)
HOUR, SECOND = timedelta(hours=1), timedelta(seconds=1)

Body = Callable[[bytes], bytes]
Value = TypeVar("Value")


def now() -> datetime:
    return datetime.now(UTC)


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = (f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, "", "")).encode() + body


@dataclass
class Script:
    """A responder on loopback that answers each question with what `answer` makes of it: whole HTTP responses."""

    answer: Body
    questions: list[bytes] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    open: int = 0
    most: int = 0
    go: threading.Event = field(default_factory=threading.Event)  # answers wait for it

    def __enter__(self) -> Script:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self.go.set()
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        stop_accepting(self._listener, self._acceptor)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/ocsp"

    def _accept(self) -> None:
        while (connection := accepted(self._listener)) is not None:
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # who asked may be gone
            connection.settimeout(WAIT)
            data = b""
            while b"\r\n\r\n" not in data:
                if not (piece := connection.recv(1 << 16)):
                    return
                data += piece
            head, _, body = data.partition(b"\r\n\r\n")
            length = next(int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: "))
            while len(body) < length:
                if not (piece := connection.recv(1 << 16)):
                    return
                body += piece
            with self._lock:
                self.questions.append(body)
                self.heads.append(head)
                self.open += 1
                self.most = max(self.most, self.open)
            self.go.wait(WAIT)
            with self._lock:
                self.open -= 1
            connection.sendall(self.answer(body))


@dataclass
class Signed:
    """Makes signed answers to questions about any client of a CA: good, unless told otherwise."""

    ca: Ca
    status: OCSPCertStatus = OCSPCertStatus.GOOD
    this: timedelta = -SECOND
    next: timedelta | None = HOUR
    signer: Leaf | None = None
    serial: int | None = None  # the one that is asked about
    nonce: bytes | None = None  # the one that was sent

    def __call__(self, question: bytes) -> bytes:
        return http(self.der(question), "200 OK", "Content-Type: application/ocsp-response")

    def der(self, question: bytes) -> bytes:
        asked = load_der_ocsp_request(question)
        signer = self.signer or Leaf(self.ca.certificate, self.ca.key)
        moment = now()
        builder = OCSPResponseBuilder().add_response_by_hash(
            *(asked.issuer_name_hash, asked.issuer_key_hash, self.serial or asked.serial_number, hashes.SHA1()),
            *(self.status, moment + self.this, None if self.next is None else moment + self.next),
            *((moment, None) if self.status is OCSPCertStatus.REVOKED else (None, None)),
        )
        builder = builder.responder_id(OCSPResponderEncoding.HASH, signer.certificate)
        nonce = asked.extensions.get_extension_for_class(x509.OCSPNonce).value.nonce
        builder = builder.add_extension(x509.OCSPNonce(self.nonce or nonce), False)
        if self.signer is not None:
            builder = builder.certificates([self.signer.certificate])
        return builder.sign(signer.key, hashes.SHA256()).public_bytes(Encoding.DER)


def client(ca: Ca, *urls: str, name: str = "spiffe://test/web") -> Leaf:
    """A client whose certificate names responders."""
    access = [
        x509.AccessDescription(AuthorityInformationAccessOID.OCSP, x509.UniformResourceIdentifier(url)) for url in urls
    ]
    return ca.client(name, extra=[(x509.AuthorityInformationAccess(access), False)] if access else [])


def peer(ca: Ca, leaf: Leaf) -> VerifiedPeer:
    bundle, at = TrustBundle((ca.certificate,)), now()
    return verify(leaf.presented, Terms(bundle, Purpose.CLIENT), at, judge_offline(leaf.presented, bundle, at))


def code(verdict: Verdict) -> str:
    """A verdict in one word: why it refuses, or that it lets in, with or without an answer."""
    if verdict.failure is not None:
        return verdict.failure.reason.code
    return "unanswered" if verdict.unanswered is not None else "good"


def detail(verdict: Verdict) -> str:
    failure = verdict.failure or verdict.unanswered
    assert failure is not None
    return str(failure.facts["detail"])


def checked(ca: Ca, leaf: Leaf, policy: Ocsp = Ocsp.REQUIRE, **how: Any) -> Verdict:
    """What a checker that knows nothing says."""
    checker = OcspChecker(policy, **({"hosts": LOOPBACK} | how))
    return asyncio.run(checker.check(peer(ca, leaf), now()))


# The real one: `openssl ocsp`.


@contextmanager
def openssl(ca: Ca, folder: Path, signer: Leaf, *lines: str) -> Iterator[str]:
    """`openssl ocsp` on a free port, over an index of certificates; gives its URL."""
    (folder / "index.txt").write_text("".join(f"{line}\n" for line in lines))
    cert, key = signer.save(folder, "responder")
    bundle = ca.save(folder, "issuer")
    words = ("-index", "index.txt", "-CA", bundle, "-rsigner", cert, "-rkey", key, "-port", "0", "-nmin", "5")
    with Child(("openssl", "ocsp", *words), folder) as child:
        port = int(child.line("^ACCEPT").split()[1].rpartition(":")[2])
        yield f"http://127.0.0.1:{port}/"


def entry(leaf: Leaf, *, revoked: bool = False) -> str:
    """A line of an `openssl ca` index."""
    serial = f"{leaf.certificate.serial_number:X}"
    serial = "0" * (len(serial) % 2) + serial
    end, since = "401231235959Z", f"{now():%y%m%d%H%M%SZ}"
    return f"R\t{end}\t{since},keyCompromise\t{serial}\tunknown\t/" if revoked else f"V\t{end}\t\t{serial}\tunknown\t/"


@pytest.mark.parametrize("signs", ["the issuer", "a delegate"])
def test_the_responder_of_openssl(ca: Ca, tmp_path: Path, signs: str) -> None:
    """What openssl's responder says good, revoked and unknown of is let in, refused and refused."""
    issuer = Leaf(ca.certificate, ca.key)
    signer = issuer if signs == "the issuer" else ca.leaf(cn="Responder", eku=[ExtendedKeyUsageOID.OCSP_SIGNING])
    good, revoked, unknown = ca.client(), ca.client(), ca.client()
    with openssl(ca, tmp_path, signer, entry(good), entry(revoked, revoked=True)) as url:
        assert checked(ca, good, url=url) == Verdict()
        verdict = checked(ca, revoked, url=url)
        assert verdict.failure is not None
        assert verdict.failure.reason is Reason.VERIFY_REVOKED
        assert int(verdict.failure.facts["serial"], 16) == revoked.certificate.serial_number
        assert "does not know" in detail(checked(ca, unknown, url=url))


def test_a_delegate_of_openssl_without_the_usage_is_refused(ca: Ca, tmp_path: Path) -> None:
    """The same responder with a certificate that is not for signing OCSP answers is not believed."""
    good = ca.client()
    with openssl(ca, tmp_path, ca.leaf(cn="Responder"), entry(good)) as url:
        assert "may not sign OCSP answers" in detail(checked(ca, good, url=url))


# Bad answers: refused by both policies.


def delegate(ca: Ca, **spec: Any) -> Leaf:
    return ca.leaf(**({"cn": "Responder", "eku": [ExtendedKeyUsageOID.OCSP_SIGNING]} | spec))


def unsigned(status: OCSPResponseStatus) -> Body:
    return lambda _: http(OCSPResponseBuilder.build_unsuccessful(status).public_bytes(Encoding.DER))


def chunked(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


ANSWERED: dict[str, tuple[Callable[[Ca], Body], str, str]] = {
    "good": (Signed, "good", ""),
    "good_by_a_delegate": (lambda ca: Signed(ca, signer=delegate(ca)), "good", ""),
    "good_until_close": (lambda ca: lambda asked: b"HTTP/1.0 200 OK\r\n\r\n" + Signed(ca).der(asked), "good", ""),
    "good_in_chunks": (lambda ca: lambda asked: chunked(Signed(ca).der(asked)), "good", ""),
    "revoked": (lambda ca: Signed(ca, OCSPCertStatus.REVOKED), "verify.revoked", ""),
    "unknown": (lambda ca: Signed(ca, OCSPCertStatus.UNKNOWN), "verify.ocsp_invalid", "does not know"),
    "wrong_signer": (lambda _: Signed(Ca.root()), "verify.ocsp_invalid", "neither the issuer nor a delegate"),
    "no_eku": (lambda ca: Signed(ca, signer=delegate(ca, eku=None)), "verify.ocsp_invalid", "may not sign OCSP"),
    "stale": (lambda ca: Signed(ca, this=-2 * HOUR, next=-HOUR), "verify.ocsp_invalid", "stale"),
    "future": (lambda ca: Signed(ca, this=HOUR, next=2 * HOUR), "verify.ocsp_invalid", "dated in the future"),
    "other_serial": (lambda ca: Signed(ca, serial=7), "verify.ocsp_invalid", "about another certificate"),
    "other_nonce": (lambda ca: Signed(ca, nonce=bytes(32)), "verify.ocsp_invalid", "nonce differs"),
    "try_later": (lambda _: unsigned(OCSPResponseStatus.TRY_LATER), "verify.ocsp_invalid", "try later"),
    "unauthorized": (lambda _: unsigned(OCSPResponseStatus.UNAUTHORIZED), "verify.ocsp_invalid", "unauthorized"),
    "garbage": (lambda _: lambda _: http(b"\x30\x03\x0a\x01"), "verify.ocsp_invalid", "cannot be read"),
    "empty": (lambda _: lambda _: http(b""), "verify.ocsp_invalid", "cannot be read"),
    "html": (lambda _: lambda _: http(b"<html>"), "verify.ocsp_invalid", "cannot be read"),
    "not_http": (lambda _: lambda _: b"220 mail.example ESMTP\r\n\r\n", "verify.ocsp_invalid", "not HTTP"),
    "large": (lambda _: lambda _: http(bytes(1 << 20)), "verify.ocsp_invalid", "larger than 65536"),
    "large_in_chunks": (lambda _: lambda _: chunked(bytes(1 << 20)), "verify.ocsp_invalid", "larger than 65536"),
    "large_head": (lambda _: lambda _: b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 17), "verify.ocsp_invalid", ""),
    "unavailable": (lambda _: lambda _: http(b"", "503 Service Unavailable"), "verify.ocsp_invalid", "HTTP 503"),
}


@pytest.mark.parametrize("policy", BOTH)
@pytest.mark.parametrize("case", ANSWERED)
def test_an_answer_that_is_there_decides(ca: Ca, case: str, policy: Ocsp) -> None:
    """A good answer lets in; one that is bad, revoked or unknown refuses for its reason, whatever the policy."""
    make, expected, words = ANSWERED[case]
    with Script(make(ca)) as script:
        verdict = checked(ca, client(ca, script.url), policy)
        assert code(verdict) == expected
        if words:
            assert words in detail(verdict)
        assert len(script.questions) == 1
        assert script.heads[0].startswith(b"POST /ocsp HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % script.port)


@pytest.mark.parametrize("policy", BOTH)
def test_a_redirect_is_not_followed(ca: Ca, policy: Ocsp) -> None:
    """A responder that sends us elsewhere is a bad one, and the elsewhere hears nothing."""
    with Script(Signed(ca)) as elsewhere:
        move = http(b"", "302 Found", f"Location: {elsewhere.url}")
        with Script(lambda _: move) as script:
            verdict = checked(ca, client(ca, script.url), policy)
        assert (code(verdict), "HTTP 302" in detail(verdict)) == ("verify.ocsp_invalid", True)
        assert elsewhere.questions == []


# No answer: the policies differ.


def no_answer(verdict: Verdict, policy: Ocsp) -> str:
    """Why there was no answer, once it is sure that the policy made of it what it says."""
    assert code(verdict) == ("unanswered" if policy is Ocsp.ALLOW_UNREACHABLE else "verify.ocsp_unavailable")
    return detail(verdict)


@pytest.mark.parametrize("policy", BOTH)
def test_a_responder_that_cannot_be_reached(ca: Ca, policy: Ocsp) -> None:
    """Nobody listens, or the name leads nowhere, or the answer is cut off: no answer, and the policy decides."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and never listened on
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        assert "refused" in no_answer(checked(ca, client(ca, url), policy), policy)
    assert no_answer(checked(ca, client(ca, "http://ocsp.invalid/"), policy, hosts=frozenset()), policy)
    with Script(lambda asked: Signed(ca)(asked)[:-1]) as script:
        assert "before its answer was whole" in no_answer(checked(ca, client(ca, script.url), policy), policy)
    with Script(lambda _: b"") as script:
        assert "before its answer was whole" in no_answer(checked(ca, client(ca, script.url), policy), policy)


@pytest.mark.parametrize("policy", BOTH)
def test_a_responder_that_says_nothing(ca: Ca, policy: Ocsp) -> None:
    """Seconds are waited for a silent responder and no more, also by those who wait for their turn."""
    with Script(Signed(ca)) as script:
        script.go.clear()
        checker = OcspChecker(policy, hosts=LOOPBACK)
        count = 2 if policy is Ocsp.REQUIRE else MAX_OPEN + 2
        peers = [peer(ca, client(ca, script.url)) for _ in range(count)]

        async def ask() -> list[Verdict]:
            async with asyncio.timeout(15):
                return await asyncio.gather(*(checker.check(one, now()) for one in peers))

        for verdict in asyncio.run(ask()):
            assert "no answer" in no_answer(verdict, policy)


@pytest.mark.parametrize("policy", BOTH)
def test_a_certificate_that_names_no_responder(ca: Ca, policy: Ocsp) -> None:
    """Without a responder there is no answer; with a configured one there is."""
    assert "names no responder" in no_answer(checked(ca, ca.client(), policy), policy)
    with Script(Signed(ca)) as script:
        assert code(checked(ca, ca.client(), policy, url=script.url)) == "good"


# Whom a certificate may have us talk to.

FORBIDDEN = {
    "http://169.254.169.254/latest/meta-data": "not a public one",
    "http://localhost/": "not a public one",
    "http://127.0.0.1/": "not a public one",
    "http://[::1]/": "not a public one",
    "http://[::ffff:127.0.0.1]/": "not a public one",
    "http://10.0.0.1/": "not a public one",
    "http://192.168.1.1/": "not a public one",
    "http://0.0.0.0/": "not a public one",
    "http://93.184.215.14:22/": "not at port 80",
    "http://127.1/": "http://HOST",
    "http://2130706433/": "http://HOST",
    "http://0x7f.1/": "http://HOST",
    "https://ocsp.example/": "http://HOST",
    "file:///etc/passwd": "http://HOST",
    "ldap://ldap.example/cn=ca": "http://HOST",
    "gopher://127.0.0.1:25/": "http://HOST",
    "http://user:secret@ocsp.example/": "http://HOST",
    "http://ocsp.example/ HTTP/1.1\r\nX: y": "http://HOST",
    "http://ocsp.example:0/": "http://HOST",
    "http://ocsp.example:65536/": "http://HOST",
    f"http://ocsp.example/{'a' * 2000}": "http://HOST",
    "http:///": "http://HOST",
}


@pytest.mark.parametrize("policy", BOTH)
@pytest.mark.parametrize("url", FORBIDDEN)
def test_a_certificate_cannot_have_us_talk_to_anyone(ca: Ca, url: str, policy: Ocsp) -> None:
    """Other schemes, other ports, addresses inside and what is read in two ways are not asked."""
    verdict = checked(ca, client(ca, url), policy, hosts=frozenset())
    assert FORBIDDEN[url] in no_answer(verdict, policy)


def test_only_the_operator_opens_the_inside(ca: Ca) -> None:
    """A responder on loopback hears nothing unless the operator allows its host, or names it as the one to ask."""
    with Script(Signed(ca)) as script:
        inside, named = client(ca, script.url), client(ca, script.url.replace("127.0.0.1", "LOCALHOST."))
        for leaf in (inside, named):
            assert code(checked(ca, leaf, hosts=frozenset())) == "verify.ocsp_unavailable"
            assert "not one of ocsp_hosts" in detail(checked(ca, leaf, hosts=frozenset({"ocsp.example"})))
        assert script.heads == []
        assert code(checked(ca, inside)) == "good"
        assert code(checked(ca, named, hosts=frozenset({"localhost"}))) == "good"
        assert code(checked(ca, client(ca, "ldap://x/", script.url))) == "good"
        assert code(checked(ca, client(ca, "http://169.254.169.254/"), hosts=frozenset(), url=script.url)) == "good"
        assert len(script.heads) == 4


def test_the_operators_url_is_judged_at_once() -> None:
    """A configured URL that is none is refused before anything is served."""
    OcspChecker(Ocsp.REQUIRE, url="http://10.0.0.1:8080/ocsp")
    with pytest.raises(InvalidInput) as caught:
        OcspChecker(Ocsp.REQUIRE, url="https://10.0.0.1/")
    assert caught.value.reason is Reason.INPUT_TARGET


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        *((inside, False) for inside in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254")),
        *((odd, False) for odd in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1")),
        *((six, False) for six in ("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1")),
        *((six, False) for six in ("::ffff:127.0.0.1", "::127.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1")),
        ("2001:0:0:0:0:0:80ff:fffe", False),  # Teredo, RFC 4380: 127.0.0.1 with its bits turned
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::5db8:d70e", True),
        ("name", False),
        ("", False),
    ],
)
def test_what_a_public_address_is(address: str, public: bool) -> None:
    """Only addresses of the whole Internet are public, whatever they are wrapped in."""
    assert is_public(address) is public


# What is remembered.


def run(work: Callable[[], Awaitable[Value]]) -> Value:
    async def go() -> Value:
        return await work()

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("answer", "holds"),
    [
        (lambda ca: Signed(ca, next=timedelta(minutes=10)), timedelta(minutes=10)),
        (lambda ca: Signed(ca, next=timedelta(days=7)), HOUR),
        (lambda ca: Signed(ca, next=None), timedelta(minutes=5) - SECOND),
        (lambda ca: Signed(ca, OCSPCertStatus.REVOKED, next=timedelta(minutes=10)), timedelta(minutes=10)),
        (lambda ca: Signed(ca, OCSPCertStatus.UNKNOWN), timedelta(seconds=30)),
        (lambda ca: unsigned(OCSPResponseStatus.TRY_LATER), timedelta(seconds=30)),
        (lambda ca: lambda _: b"", timedelta(seconds=30)),
    ],
    ids=["next_update", "an_hour", "undated", "revoked", "unknown", "try_later", "nothing"],
)
def test_how_long_an_answer_is_remembered(ca: Ca, answer: Callable[[Ca], Body], holds: timedelta) -> None:
    """A signed answer holds until its nextUpdate, an hour at most; having none holds 30 s; then it is asked anew."""
    slack = timedelta(seconds=3)

    async def work() -> None:
        checker, one, moment = OcspChecker(Ocsp.REQUIRE, hosts=LOOPBACK), peer(ca, client(ca, script.url)), now()
        assert checker.known(one, moment) is None
        verdict = await checker.check(one, moment)
        assert checker.known(one, moment) is verdict
        assert await checker.check(one, moment + holds - slack) is verdict
        assert len(script.questions) == 1
        assert checker.known(one, moment + holds + slack) is None
        await checker.check(one, moment + holds + slack)
        assert len(script.questions) == 2

    with Script(answer(ca)) as script:
        run(work)


def test_one_question_for_one_certificate(ca: Ca) -> None:
    """However many wait for a word about a certificate, in however many handshakes, it is asked once."""

    async def work() -> None:
        checker, leaf = OcspChecker(Ocsp.REQUIRE, hosts=LOOPBACK), client(ca, script.url)
        verdicts = await asyncio.gather(*(checker.check(peer(ca, leaf), now()) for _ in range(20)))
        assert set(map(code, verdicts)) == {"good"}
        assert len(script.questions) == 1
        await checker.check(peer(ca, client(ca, script.url)), now())
        assert len(script.questions) == 2

    with Script(Signed(ca)) as script:
        run(work)


def test_who_goes_away_takes_the_question_from_nobody(ca: Ca) -> None:
    """A client that leaves while it waits does not end the question that another waits for too."""

    async def work() -> None:
        checker, one = OcspChecker(Ocsp.REQUIRE, hosts=LOOPBACK), peer(ca, client(ca, script.url))
        leaves, stays = (asyncio.create_task(checker.check(one, now())) for _ in range(2))
        while not script.questions:
            await asyncio.sleep(0.01)
        leaves.cancel()
        script.go.set()
        assert code(await stays) == "good"
        assert len(script.questions) == 1

    with Script(Signed(ca)) as script:
        script.go.clear()
        run(work)


def test_no_more_questions_than_the_bound(ca: Ca) -> None:
    """Of many certificates no more than MAX_OPEN are asked about at once, and all get their answer."""

    async def work() -> list[Verdict]:
        checker = OcspChecker(Ocsp.REQUIRE, hosts=LOOPBACK)
        peers = [peer(ca, client(ca, script.url)) for _ in range(MAX_OPEN + 8)]
        waiting = asyncio.gather(*(checker.check(one, now()) for one in peers))
        while len(script.questions) < MAX_OPEN:
            await asyncio.sleep(0.01)
        script.go.set()
        return await waiting

    with Script(Signed(ca)) as script:
        script.go.clear()
        assert set(map(code, run(work))) == {"good"}
        assert (script.most, len(script.questions)) == (MAX_OPEN, MAX_OPEN + 8)


def test_a_good_answer_outlives_a_bad_hour(ca: Ca) -> None:
    """Where no new answer is of worth, the last good one counts until its own nextUpdate, and no longer."""

    async def work() -> list[str]:
        checker, one, moment = OcspChecker(Ocsp.REQUIRE, hosts=LOOPBACK), peer(ca, client(ca, script.url)), now()
        codes = []
        for later in (timedelta(), 2 * HOUR, 4 * HOUR):
            codes.append(code(await checker.check(one, moment + later)))
            script.answer = lambda _: b""
        return codes

    with Script(Signed(ca, next=3 * HOUR)) as script:
        assert run(work) == ["good", "good", "verify.ocsp_unavailable"]


def test_revoked_ends_what_was_good(ca: Ca) -> None:
    """A signed word that the certificate was revoked counts at once, though the last good answer would still hold.

    It counts on where no other answer comes, also where the policy lets those in for whom there is none.
    """

    async def work() -> list[str]:
        checker, one, moment = (
            OcspChecker(Ocsp.ALLOW_UNREACHABLE, hosts=LOOPBACK),
            peer(ca, client(ca, script.url)),
            now(),
        )
        codes = [code(await checker.check(one, moment))]
        for answer in (Signed(ca, OCSPCertStatus.REVOKED, next=3 * HOUR), lambda _: b""):
            script.answer = answer
            codes.append(code(await checker.check(one, moment + 2 * HOUR * len(codes))))
        return codes

    with Script(Signed(ca, next=3 * HOUR)) as script:
        assert run(work) == ["good", "verify.revoked", "verify.revoked"]
        assert len(script.questions) == 3


# The guard.


def asking(guard: Running, policy: Ocsp = Ocsp.REQUIRE) -> None:
    """Have a running guard ask by OCSP."""
    snapshot = guard.snapshot()
    site = replace(snapshot.sites["main"].all[0], ocsp=OcspChecker(policy, hosts=LOOPBACK))
    guard.swap(Snapshot({"main": Sites([site])}))


@pytest.mark.parametrize(
    ("case", "status", "reason"),
    [
        ("revoked", 403, "verify.revoked"),
        ("stale", 403, "verify.ocsp_invalid"),
        ("unknown", 403, "verify.ocsp_invalid"),
    ],
)
def test_a_refused_client_is_told_and_the_app_sees_nothing(
    ca: Ca, ask: Ask, case: str, status: int, reason: str
) -> None:
    """A client that the responder does not call good gets its code in HTTP; one that it does gets the app's answer."""
    with App() as app, Running(ca, app.address) as guard, Script(ANSWERED[case][0](ca)) as script:
        asking(guard)
        for _ in range(2):  # asked first, then known
            answer = ask(guard, client(ca, script.url))
            assert answer.startswith(b"HTTP/1.1 %d " % status)
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"] == reason
            event = guard.events.next("connection")
            assert (event["decision"], event["reason"], event["presented"]) == ("deny", reason, "spiffe://test/web")
        assert app.connections == 0
        script.answer = Signed(ca)
        assert ask(guard, client(ca, script.url)).endswith(b"Hello World\n")


def test_what_a_client_sends_meanwhile_waits(ca: Ca, tmp_path: Path) -> None:
    """While the responder is asked nothing reaches the app; then the request that was sent early is answered."""
    with App() as app, Running(ca, app.address) as guard, Script(Signed(ca)) as script:
        asking(guard)
        script.go.clear()
        context = client_context(ca.save(tmp_path, "ca"), client(ca, script.url), tmp_path)
        host, _, port = guard.address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), timeout=WAIT) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            tls.sendall(get())
            until(lambda: script.questions, "a question")
            assert app.connections == 0
            script.go.set()
            pieces = b"".join(iter(lambda: tls.recv(1 << 16), b""))
        assert pieces.endswith(b"Hello World\n")


def test_a_client_that_leaves_while_it_waits(ca: Ca, ask: Ask, tmp_path: Path) -> None:
    """A client that goes away during the question leaves nothing behind, and the next one is let in by its answer."""
    with App() as app, Running(ca, app.address) as guard, Script(Signed(ca)) as script:
        asking(guard)
        script.go.clear()
        leaf = client(ca, script.url)
        context = client_context(ca.save(tmp_path, "ca"), leaf, tmp_path)
        host, _, port = guard.address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), timeout=WAIT) as plain,
            context.wrap_socket(plain, server_hostname="localhost"),
        ):
            until(lambda: script.questions, "a question")
        script.go.set()
        assert ask(guard, leaf).endswith(b"Hello World\n")
        until(lambda: not guard.guard.connections, "the end of all")
        assert (app.connections, len(script.questions)) == (1, 1)


def test_a_guard_that_stops_lets_nobody_in_any_more(ca: Ca, tmp_path: Path) -> None:
    """A client whose answer comes once the guard is stopping is closed, not let in."""
    with App() as app, Script(Signed(ca)) as script:
        with Running(ca, app.address) as guard:
            asking(guard)
            script.go.clear()
            context = client_context(ca.save(tmp_path, "ca"), client(ca, script.url), tmp_path)
            host, _, port = guard.address.rpartition(":")
            plain = socket.create_connection((host, int(port)), timeout=WAIT)
            tls = context.wrap_socket(plain, server_hostname="localhost")
            until(lambda: script.questions, "a question")
            guard.call(lambda: setattr(guard.guard, "draining", True))
            script.go.set()
            with tls:
                assert is_cut_off(tls)
        assert app.connections == 0


@pytest.mark.parametrize("policy", BOTH)
def test_without_an_answer_the_policy_decides(ca: Ca, ask: Ask, policy: Ocsp) -> None:
    """Without a responder, `require` refuses with 503, and `allow_unreachable` lets in and says so in the log."""
    with App() as app, Running(ca, app.address) as guard:
        asking(guard, policy)
        answer = ask(guard, ca.client())
        if policy is Ocsp.REQUIRE:
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"verify.ocsp_unavailable" in answer
            assert app.connections == 0
            return
        assert answer.endswith(b"Hello World\n")
        event = guard.events.next("ocsp")
        assert (event["decision"], event["reason"]) == ("allow", "verify.ocsp_unavailable")
        assert event["peer"] == "spiffe://test/web"


def test_tcp_is_refused_by_closing(ca: Ca, ask: Ask) -> None:
    """In TCP mode a revoked client is cut off before the app is dialled, and a good one is connected."""

    def hello(connection: socket.socket, _request: bytes) -> None:
        connection.sendall(HELLO)
        connection.shutdown(socket.SHUT_WR)

    with App(hello) as app, Running(ca, f"tcp://{app.address}") as guard, Script(Signed(ca)) as script:
        asking(guard)
        assert ask(guard, client(ca, script.url)).endswith(b"Hello World\n")
        script.answer = Signed(ca, OCSPCertStatus.REVOKED)
        assert ask(guard, client(ca, script.url)) == b""
        assert app.connections == 1


@pytest.mark.parametrize("case", ["revoked", "good", "no_answer"])
def test_an_open_connection_is_asked_about_anew(ca: Ca, tmp_path: Path, case: str) -> None:
    """When an answer has run out, it is asked anew: a revoked peer is cut off, a good one stays.

    So does one for whom nobody answers where the policy is to require it; it is cut off.
    """
    with App() as app, Running(ca, app.address) as guard, Script(Signed(ca, next=SECOND)) as script:
        asking(guard)
        context = client_context(ca.save(tmp_path, "ca"), client(ca, script.url), tmp_path)
        host, _, port = guard.address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), timeout=WAIT) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            tls.sendall(get(close=False))
            assert tls.recv(1 << 16).endswith(b"Hello World\n")
            answers: dict[str, Body] = {
                "revoked": Signed(ca, OCSPCertStatus.REVOKED),
                "good": Signed(ca),
                "no_answer": lambda _: b"",
            }
            script.answer = answers[case]
            before = len(script.questions)
            until(lambda: len(script.questions) > before, "another question")
            if case == "good":
                tls.sendall(get())
                assert tls.recv(1 << 16).endswith(b"Hello World\n")
                return
            ended = guard.events.next("ended")
            assert ended["reason"] == ("ended.revoked" if case == "revoked" else "verify.ocsp_unavailable")
            assert is_cut_off(tls)


CONFIG = """
[[listener]]
listen = "127.0.0.1:0"
cert = "server.crt"
key = "server.key"
client_ca = "ca.crt"
to = "{app}"
"""


def test_what_is_known_outlives_a_reload(ca: Ca, tmp_path: Path) -> None:
    """Sites that ask alike share what they know, over reloads; a site that does not ask has no checker."""
    ca.save(tmp_path, "ca")
    ca.server().save(tmp_path, "server")
    text = CONFIG.format(app="127.0.0.1:1")
    asks = text + 'ocsp = "require"\nocsp_hosts = ["OCSP.Example."]\n'

    def checker(assembly: Assembly) -> OcspChecker | None:
        return assembly.build(now()).sites["listener-1"].all[0].ocsp

    assembly = Assembly(parse_config(asks, "handfast.toml", tmp_path), lambda path: b"")
    first = checker(assembly)
    assert first is not None
    assert checker(assembly) is first
    assert checker(Assembly(parse_config(text, "handfast.toml", tmp_path), lambda path: b"")) is None


def test_the_guard_by_its_configuration(ca: Ca, tmp_path: Path) -> None:
    """`handfast guard` asks the responder that each client names: the good one comes in, the revoked one does not."""
    ca.save(tmp_path, "ca")
    ca.server().save(tmp_path, "server")
    with App() as app, Script(lambda asked: answers[load_der_ocsp_request(asked).serial_number](asked)) as script:
        good, revoked = client(ca, script.url), client(ca, script.url)
        good.save(tmp_path, "good")
        revoked.save(tmp_path, "revoked")
        answers = {good.certificate.serial_number: Signed(ca)}
        answers[revoked.certificate.serial_number] = Signed(ca, OCSPCertStatus.REVOKED)
        text = CONFIG.format(app=app.address) + 'ocsp = "require"\nocsp_hosts = ["127.0.0.1"]\n'
        (tmp_path / "handfast.toml").write_text(text)
        with Child((*HANDFAST, "guard", "-c", "handfast.toml", "--json"), tmp_path, merge=False) as child:
            port = json.loads(child.line())["url"].rpartition(":")[2]
            url = f"https://localhost:{port}/"
            words = {
                name: ("--cacert", "ca.crt", "--cert", f"{name}.crt", "--key", f"{name}.key")
                for name in ("good", "revoked")
            }
            assert curl(url, *words["good"], folder=tmp_path).body == "Hello World\n"
            answer = curl(url, *words["revoked"], folder=tmp_path)
            assert (answer.status, answer.error) == (403, "verify.revoked")
        assert len(script.questions) == 2


def is_cut_off(tls: ssl.SSLSocket) -> bool:
    """Whether the guard has closed the connection: with a reset, or an end of which TLS says nothing."""
    try:
        return tls.recv(1) == b""
    except (ConnectionResetError, ssl.SSLEOFError):
        return True
