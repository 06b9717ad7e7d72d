"""Asks the responders of the clients' authorities by OCSP, and remembers what they said. `pki.ocsp` judges the answers.

Theory of operation. For each certificate there is one thing known: a verdict, and until when it holds. Where it has run
out, one question is asked, however many connections wait for it.

    what came                                   require     allow_unreachable   holds
    good, signed                                let in      let in              until nextUpdate, an hour at most
    revoked, signed                             refused     refused             until nextUpdate, an hour at most
    unknown, stale, forged, not understood      refused     refused             30 s
    nothing: no responder, no way there         refused     let in, logged      30 s

Where nothing of worth comes, the last good answer counts on until its own nextUpdate, and a revocation for good. An
address that a certificate names was chosen by its authority and not by the operator: it is asked only in plain HTTP, at
port 80 and at a public address, unless the operator named its host. The address is looked up once, judged, and then
dialled as a number.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import socket
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from handfast.errors import Failure, HandfastError, InvalidInput, Reason, RemoteProtocolError, Unreachable
from handfast.guard.places import join_address
from handfast.guard.schema import Ocsp
from handfast.pki.certificates import fingerprint, label, serial_text
from handfast.pki.ocsp import MAX_ANSWER, NONCE, Question, Status, build_request, read_answer, responders
from handfast.pki.verification import VerifiedPeer
from handfast.wire.bodies import BodyKind, body_reader
from handfast.wire.http1 import MAX_HEAD, ResponseHead, find_head, parse_response_head
from handfast.wire.targets import normal_host

TIMEOUT = 3.0  # seconds from looking up the responder to the last byte of its answer; as long again for a turn
MAX_OPEN = 32  # questions at once
MAX_KNOWN = 32_768  # certificates, of about 0.3 KiB here
MAX_PEERS = 16_384  # peers that are found without hashing
LONGEST = timedelta(hours=1)  # that an answer is believed
SHORT = timedelta(seconds=30)  # that having none is remembered
_SHORTEST = timedelta(seconds=1)  # between two questions about one certificate, also where clocks differ

URL = r"http://(\[[0-9A-Fa-f:.]{2,45}\]|[0-9A-Za-z._-]{1,254})(?::([0-9]{1,5}))?(/[!-~]{0,1000})?"
_URL = re.compile(URL, re.I)
_NEVER = datetime.min.replace(tzinfo=UTC)
_ADDRESSES = 3  # of a responder that are tried
_ATTEMPT = 1.0  # seconds for each of them
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last four bytes are an IPv4 address


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a certificate. `failure`: why its holder may not come in, or stay.

    `unanswered`: what is to be logged where nobody answered and the policy lets that pass.
    """

    failure: Failure | None = None
    unanswered: Failure | None = None


@dataclass(frozen=True, slots=True)
class Responder:
    """Where to ask. `host` as `normal_host` gives it; `trusted`: the operator named it, so it may be anywhere."""

    host: str
    port: int
    path: str
    trusted: bool

    def __str__(self) -> str:
        return join_address(self.host, self.port)


@dataclass(slots=True, eq=False)
class _Known:
    """One certificate: the verdict, until when it holds, and until when the last good answer does."""

    verdict: Verdict | None = None
    until: datetime = _NEVER
    good_until: datetime = _NEVER
    asking: asyncio.Task[Verdict] | None = None


_GOOD = Verdict()


class OcspChecker:
    """Whether clients' certificates were revoked. It may serve any number of sites that ask in the same way.

    `policy`: not OFF. `url`: the one responder that is asked, whatever certificates name. `hosts`: in the form of
    `normal_host`; where there are any, no other responder that a certificate names is asked. Raises InvalidInput
    (INPUT_TARGET) for a URL that is none.
    """

    def __init__(self, policy: Ocsp, *, url: str | None = None, hosts: frozenset[str] = frozenset()) -> None:
        self._lets_pass = policy is Ocsp.ALLOW_UNREACHABLE
        self._fixed = None if url is None else _parse_url(url, trusted=True)
        self._hosts = hosts
        self._known: OrderedDict[tuple[str, int], _Known] = OrderedDict()  # by issuer and serial, oldest use first
        # The same by the peer: hashing certificates is dear for what is looked at twice a second and connection.
        self._by_peer: dict[int, tuple[VerifiedPeer, _Known]] = {}
        self._turns = asyncio.Semaphore(MAX_OPEN)
        self._silent: set[str] = set()  # the responders that did not answer when last asked

    def known(self, peer: VerifiedPeer, now: datetime) -> Verdict | None:
        """Return what is known at `now`, at once; None if it has to be asked."""
        held = self._by_peer.get(id(peer))
        known = self._remember(peer) if held is None else held[1]
        return known.verdict if now < known.until else None

    async def check(self, peer: VerifiedPeer, now: datetime) -> Verdict:
        """Return what is known, and ask first if it is not. It takes 2 * TIMEOUT seconds at most."""
        verdict = self.known(peer, now)
        if verdict is not None:
            return verdict
        return await asyncio.shield(self.renew(peer, now))  # who waits may go away; others wait for it too

    def renew(self, peer: VerifiedPeer, now: datetime) -> asyncio.Task[Verdict]:
        """Ask about the peer, unless that is being done; `known` has it then."""
        known = self._remember(peer)
        if known.asking is None:
            known.asking = asyncio.get_running_loop().create_task(self._ask(known, peer, now))
        return known.asking

    def _remember(self, peer: VerifiedPeer) -> _Known:
        held = self._by_peer.get(id(peer))
        if held is not None:
            return held[1]
        key = fingerprint(peer.path[min(1, len(peer.path) - 1)]), peer.leaf.serial_number
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = _Known()
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
                self._by_peer.clear()
        else:
            self._known.move_to_end(key)
        if len(self._by_peer) >= MAX_PEERS:
            self._by_peer.clear()
        self._by_peer[id(peer)] = peer, known  # the peer is held, so that nothing else gets its id
        return known

    async def _ask(self, known: _Known, peer: VerifiedPeer, now: datetime) -> Verdict:
        try:
            verdict, until = await self._asked(known, peer, now)
        except HandfastError as error:
            until, last = now + SHORT, known.verdict
            if now < known.good_until:
                verdict, until = _GOOD, min(until, known.good_until)
            elif last is not None and last.failure is not None and last.failure.reason is Reason.VERIFY_REVOKED:
                verdict = last
            elif isinstance(error, Unreachable) and self._lets_pass:
                verdict = Verdict(unanswered=error.failure)
            else:
                verdict = Verdict(error.failure)
        except Exception as bug:  # ours, and nobody may be waiting who would see it: it refuses
            detail = f"{type(bug).__name__}: {bug}"[:200]
            verdict, until = Verdict(Failure(Reason.BUG, {"detail": detail})), now + SHORT
        finally:
            known.asking = None
        known.verdict, known.until = verdict, until
        return verdict

    async def _asked(self, known: _Known, peer: VerifiedPeer, now: datetime) -> tuple[Verdict, datetime]:
        """What a responder says, and how long it is believed.

        Raises Unreachable (VERIFY_OCSP_UNAVAILABLE) where there is no answer, RemoteProtocolError (VERIFY_OCSP_INVALID)
        where there is a bad one, and HandfastError (VERIFY_OCSP_UNAVAILABLE) where it could not be asked in time.
        """
        responder = self._responder(peer)
        question = Question(peer.leaf, peer.path[1], secrets.token_bytes(NONCE))
        await self._turn(responder, peer)
        try:
            async with asyncio.timeout(TIMEOUT):
                data = await _exchange(responder, build_request(question))
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            self._note(responder, silent=True)
            detail = f"no answer in {TIMEOUT:g} s" if isinstance(error, TimeoutError) else _words(error)
            raise _unavailable(peer, f"{responder}: {detail}") from None
        except _Unfit as unfit:
            self._note(responder, silent=False)
            facts = {"subject": label(peer.leaf), "detail": f"{responder}: {unfit}"}
            raise RemoteProtocolError(Reason.VERIFY_OCSP_INVALID, **facts) from None
        except _Forbidden as forbidden:
            raise _unavailable(peer, f"{responder} is not asked: {forbidden}") from None
        finally:
            self._turns.release()
        self._note(responder, silent=False)
        answer = read_answer(data, question, now)
        until = max(min(answer.until, now + LONGEST), now + _SHORTEST)
        known.good_until = _NEVER
        match answer.status:
            case Status.GOOD:
                known.good_until = answer.until
                return _GOOD, until
            case Status.REVOKED:
                facts = {"subject": label(peer.leaf), "serial": serial_text(peer.leaf.serial_number)}
                return Verdict(Failure(Reason.VERIFY_REVOKED, facts)), until
            case Status.UNKNOWN:
                facts = {"subject": label(peer.leaf), "detail": "the responder does not know the certificate"}
                return Verdict(Failure(Reason.VERIFY_OCSP_INVALID, facts)), now + SHORT

    async def _turn(self, responder: Responder, peer: VerifiedPeer) -> None:
        """Wait for one of MAX_OPEN places. A responder that is silent anyway is not waited for.

        Where responders answer, and too many wait for them, nobody is let in unasked: not an Unreachable.
        """
        if not (self._turns.locked() and str(responder) in self._silent):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TIMEOUT):
                    await self._turns.acquire()
                return
        if str(responder) in self._silent:
            raise _unavailable(peer, f"{responder}: no answer to others")
        facts = {"subject": label(peer.leaf), "detail": f"{responder}: too many questions are open"}
        raise HandfastError(Reason.VERIFY_OCSP_UNAVAILABLE, **facts)

    def _note(self, responder: Responder, *, silent: bool) -> None:
        if not silent:
            self._silent.discard(str(responder))
            return
        if len(self._silent) >= MAX_KNOWN:
            self._silent.clear()
        self._silent.add(str(responder))

    def _responder(self, peer: VerifiedPeer) -> Responder:
        """Whom to ask about the peer. Raises Unreachable where there is nobody."""
        if len(peer.path) < 2:
            raise _unavailable(peer, "it is trusted by itself, so nobody answers for it")
        if self._fixed is not None:
            return self._fixed
        objection = "it names no responder"
        for url in responders(peer.leaf):
            try:
                found = _parse_url(url, trusted=False)
            except InvalidInput as error:
                objection = str(error)
                continue
            if found.host in self._hosts:
                return Responder(found.host, found.port, found.path, trusted=True)
            if self._hosts:
                objection = f"its responder {found} is not one of ocsp_hosts"
            elif found.port != 80:
                objection = f"its responder {found} is not at port 80; ocsp_hosts may allow it"
            else:
                return found
        raise _unavailable(peer, objection)


class _Unfit(Exception):
    """What came from a responder is not an answer; the text says what it is."""


class _Forbidden(Exception):
    """A responder that is not to be asked; the text says why."""


def _unavailable(peer: VerifiedPeer, detail: str) -> Unreachable:
    return Unreachable(Reason.VERIFY_OCSP_UNAVAILABLE, subject=label(peer.leaf), detail=detail)


def _words(error: OSError | EOFError) -> str:
    if isinstance(error, EOFError):
        return "it closed the connection before its answer was whole"
    if isinstance(error, socket.gaierror):
        return "its name cannot be looked up"
    return os.strerror(error.errno).lower() if error.errno else type(error).__name__


def _parse_url(url: str, *, trusted: bool) -> Responder:
    """Raises InvalidInput (INPUT_TARGET)."""
    found = _URL.fullmatch(url)
    host = None if found is None else normal_host(found[1].strip("[]"))
    port = 80 if found is None or found[2] is None else int(found[2])
    if found is None or host is None or not 0 < port <= 65535:
        detail = "a responder is asked by http://HOST[:PORT][/PATH] alone"
        raise InvalidInput(Reason.INPUT_TARGET, value=url[:100], detail=detail)
    return Responder(host.decode("ascii"), port, (found[3] or "/").partition("#")[0], trusted)


# The way there and back.


async def _exchange(responder: Responder, request: bytes) -> bytes:
    """Ask (RFC 6960 A.1) and return the body of the answer. Raises OSError, EOFError, _Unfit, _Forbidden."""
    reader, writer = await _connect(responder)
    try:
        lines = (
            f"POST {responder.path} HTTP/1.1",
            f"Host: {join_address(responder.host, responder.port).removesuffix(':80')}",
            "Content-Type: application/ocsp-request",
            f"Content-Length: {len(request)}",
            "Accept: application/ocsp-response",
            "Connection: close",
        )
        writer.write("".join(f"{line}\r\n" for line in (*lines, "")).encode("ascii") + request)
        return await _read(reader)
    except RemoteProtocolError as error:
        raise _Unfit(f"what came is not HTTP ({error.failure.message})") from None
    finally:
        writer.transport.abort()


async def _connect(responder: Responder) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    addresses = await _look_up(responder)
    for number, address in enumerate(addresses, 1):
        try:
            async with asyncio.timeout(_ATTEMPT if number < len(addresses) else None):
                return await asyncio.open_connection(address, responder.port, limit=MAX_ANSWER)
        except OSError:
            if number == len(addresses):
                raise
    raise AssertionError("there is an address, and the last one is tried without a way on")


async def _look_up(responder: Responder) -> list[str]:
    """The addresses that may be dialled, at least one. What is dialled is what was judged: no second look-up."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(responder.host, responder.port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise _Forbidden("it is no name") from None
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    allowed = [address for address in addresses if responder.trusted or is_public(address)]
    if not allowed:
        raise _Forbidden("its address is not a public one; ocsp_hosts may allow it")
    return allowed[:_ADDRESSES]


def is_public(address: str) -> bool:
    """Whether an address is one of the whole Internet's, whatever it is wrapped in; False for what is no address."""
    try:
        found: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if found in _NAT64:
            inner = IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            found = inner
        elif int(found) >> 32 == 0 or found.is_site_local:  # ::a.b.c.d and fec0::/10, both retired
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


async def _read(reader: asyncio.StreamReader) -> bytes:
    """The body of the response. Raises OSError, EOFError, RemoteProtocolError, _Unfit."""
    buffer = bytearray()
    while (end := find_head(buffer)) < 0:
        piece = await reader.read(MAX_HEAD)
        if not piece:
            raise EOFError
        buffer += piece
    head: ResponseHead = parse_response_head(bytes(buffer[:end]), b"POST")
    if head.status != 200:  # a redirect too: where it leads was chosen by nobody whom we trust
        raise _Unfit(f"HTTP {head.status}")
    body = body_reader(head.body, head.length, decode=True)
    if head.body is BodyKind.LENGTH and head.length > MAX_ANSWER:
        raise _Unfit(f"larger than {MAX_ANSWER} bytes")
    data, piece = bytearray(), bytes(buffer[end:])
    while True:
        data += body.feed(piece)[0]
        if len(data) > MAX_ANSWER:
            raise _Unfit(f"larger than {MAX_ANSWER} bytes")
        if body.done:
            return bytes(data)
        piece = await reader.read(1 << 14)
        if not piece:
            if head.body is BodyKind.UNTIL_CLOSE:
                return bytes(data)
            raise EOFError
