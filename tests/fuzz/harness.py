"""Fuzzing of the readers of untrusted bytes: `python -m tests.fuzz.harness TARGET --seconds N`, or `all`.

A target is a function of bytes with seeds. It may raise what its reader says that it raises; anything else is a
crash, and so is an `assert` that does not hold: the reader said two things of the same bytes. With atheris
(`pip install atheris`) coverage of our code leads the way, else mutations of the seeds at random.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from tests.support.certs import Ca

LED = __name__ == "__main__" and find_spec("atheris") is not None and "--blind" not in sys.argv
_atheris: Any = importlib.import_module("atheris") if LED else None

with _atheris.instrument_imports(include=["handfast"]) if LED else nullcontext():
    from handfast.errors import InvalidInput, IssuanceRefused, RemoteProtocolError, VerificationFailed
    from handfast.explain.capture import read_capture
    from handfast.guard.config import parse_config, parse_rules
    from handfast.pki.certificates import parse_certificates
    from handfast.pki.inspect import describe, render
    from handfast.pki.requests import parse_csr
    from handfast.pki.revocation import check_crls, parse_crls
    from handfast.pki.verification import Purpose, Terms, TrustBundle, verify
    from handfast.tls.judge import judge_offline
    from handfast.wire import http2
    from handfast.wire.bodies import ChunkedReader
    from handfast.wire.hello import HelloReader
    from handfast.wire.http1 import (
        Header,
        RequestHead,
        find_head,
        parse_request_head,
        parse_response_head,
        rewrite_request,
        rewrite_response,
    )
    from handfast.wire.identity import claims_identity
    from handfast.wire.messages import TLS_1_2, TLS_1_3, Message, read_message
    from handfast.wire.proxy import Address, Endpoints, TlsFacts, proxy_v2, read_proxy
    from handfast.wire.records import MessageJoiner, RecordReader
    from handfast.wire.targets import ambiguous_path, normal_host, parse_host
    from handfast.wire.usual import Requests, usual_answer
    from tests.support.proxies import summed

WIRE = Path(__file__).parents[1] / "wire"
CRASHED = 77  # libFuzzer's exit code for a crash
LONGEST = 4096  # bytes of an input
OURS: tuple[Header, ...] = ((b"Client-Identity", b'"spiffe://test/web"'),)

Fuzz = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """A reader and how to try it. `seeds` are inputs that it takes: most of what is near them is almost right."""

    fuzz: Fuzz
    seeds: Callable[[], list[bytes]]


# HTTP/1.1


def fuzz_request(data: bytes) -> None:
    """What is accepted has one reading, and no identity but ours when it leaves."""
    try:
        end = find_head(data)
        head = parse_request_head(data[:end] if end >= 0 else data)
    except RemoteProtocolError:
        return
    sent = rewrite_request(head, OURS, claims_identity)
    again = parse_request_head(sent)
    assert (again.method, again.target, again.body, again.length) == (head.method, head.target, head.body, head.length)
    assert again.host == head.host
    assert [header for header in again.headers if claims_identity(header[0])] == list(OURS)
    assert sent.count(b"\r\n\r\n") == 1
    assert sent.endswith(b"\r\n\r\n")


def fuzz_requests(data: bytes) -> None:
    """A connection that remembers its last requests reads the next as one that does not."""
    known = Requests(OURS, claims_identity)
    while (end := _end(data)) > 0:
        head, data = data[:end], data[end:]
        short = known.usual(head)
        if short is not None:
            assert _strictly(head) == short
        strictly = _strictly(head)
        try:
            parsed = known.parse(head)
        except RemoteProtocolError:
            parsed = None
        assert strictly == (None if parsed is None else (parsed, known.rewrite(parsed)))
        if parsed is None:
            return


def _end(data: bytes) -> int:
    try:
        return find_head(data)
    except RemoteProtocolError:
        return -1


def _strictly(head: bytes) -> object:
    try:
        parsed = parse_request_head(head)
    except RemoteProtocolError:
        return None
    return parsed, rewrite_request(parsed, OURS, claims_identity)


def fuzz_response(data: bytes) -> None:
    """What the short way takes the strict one takes alike."""
    short = usual_answer(data)
    try:
        head = parse_response_head(data, b"GET")
    except RemoteProtocolError:
        assert short is None
        return
    if head.status != 101:
        sent = rewrite_response(head, True)
        if head.status >= 200:
            again = parse_response_head(sent, b"GET")
            assert (again.status, again.body, again.length) == (head.status, head.body, head.length)
        if short is not None:
            assert (short[0].status, short[0].length, short[0].body) == (head.status, head.length, head.body)
            assert parse_response_head(short[1], b"GET").length == head.length


def fuzz_chunks(data: bytes) -> None:
    """A chunked body has the same end and the same contents however it is cut."""
    whole = _chunks([data])
    assert whole == _chunks([data[at : at + 1] for at in range(len(data))])
    assert whole == _chunks([data[:7], data[7:]])


def _chunks(pieces: list[bytes]) -> tuple[bytes, int, bool] | str:
    reader, out, used = ChunkedReader(True), b"", 0
    for piece in pieces:
        try:
            made, taken = reader.feed(piece)
        except RemoteProtocolError as error:
            return error.reason.code
        out, used = out + made, used + taken
        if reader.done:
            break
        assert taken == len(piece)
    return out, used, reader.done


def fuzz_names(data: bytes) -> None:
    """Hosts and paths raise nothing; a normal host is its own normal form."""
    ambiguous_path(data)
    parse_host(data)
    host = normal_host(data)
    assert host is None or normal_host(host) == host


# HTTP/2


def fuzz_http2(data: bytes) -> None:
    """A header list that is accepted becomes a head that HTTP/1.1 accepts alike, and no identity but ours goes on."""
    fields = _fields(data[1:])
    try:
        head = http2.request_head(fields, bool(data[:1] > b"\x7f"))
    except RemoteProtocolError:
        pass
    else:
        _goes_on(fields, head)
    for read in (http2.app_answer, http2.trailer_fields):
        with suppress(RemoteProtocolError):
            read(fields)


def _goes_on(fields: list[Header], head: RequestHead) -> None:
    again = parse_request_head(rewrite_request(head, OURS, claims_identity))
    assert (again.method, again.target, again.host) == (head.method, head.target, head.host)
    if head.upgrade is None:
        sent = http2.request_fields(fields, head, OURS, claims_identity)
        assert [header for header in sent if claims_identity(header[0])] == [(n.lower(), v) for n, v in OURS]
        assert all(not set(b"\r\n\0") & set(name + value) for name, value in sent)


def _fields(data: bytes) -> list[Header]:
    """Names and values, each behind a byte with its length."""
    words, at = [], 0
    while at < len(data):
        words.append(data[at + 1 : at + 1 + data[at]])
        at += 1 + data[at]
    return list(zip(words[::2], words[1::2], strict=False))


def _words(*fields: tuple[str, str]) -> bytes:
    words = [word.encode() for field in fields for word in field]
    return b"\0" + b"".join(bytes([len(word)]) + word for word in words)


# The first bytes of a connection


def fuzz_proxy(data: bytes) -> None:
    """A header has one length, and none of its beginnings is taken for all of it."""
    try:
        read = read_proxy(data)
    except RemoteProtocolError:
        return
    if read is not None:
        used = read[1]
        assert 0 < used <= len(data)
        assert read_proxy(data[:used]) == read
        assert read_proxy(data[: used - 1]) is None


def fuzz_hello(data: bytes) -> None:
    """A hello is the same however its bytes are cut."""
    step = 1 if len(data) < 400 else 29
    assert _hello([data]) == _hello([data[at : at + step] for at in range(0, len(data), step)])
    assert _hello([data]) == _hello([data[:11], data[11:]])


def _hello(pieces: list[bytes]) -> object:
    reader = HelloReader()
    for piece in pieces:
        try:
            found = reader.feed(piece)
        except RemoteProtocolError as error:
            return error.reason
        if found is not None:
            return found
    return None


def fuzz_messages(data: bytes) -> None:
    """Records and messages raise nothing, whatever version and suite were settled."""
    records, joiner = RecordReader(), MessageJoiner()
    for record in records.feed(data):
        for message in joiner.feed(record.payload):
            _read_all(message)
    _read_all(data)
    if len(data) >= 4:
        _read_all(data[:1] + (len(data) - 4).to_bytes(3, "big") + data[4:])


def _read_all(data: bytes) -> list[Message]:
    return [read_message(data, version, suite) for version in (TLS_1_2, TLS_1_3) for suite in (0, 0xC02B, 0x009E)]


# Certificates and what goes with them


@cache
def _pki() -> tuple[Ca, Ca, datetime]:
    root = Ca.root()
    return root, root.sub(), datetime.now(UTC)


def fuzz_chain(data: bytes) -> None:
    """A damaged chain is refused with reasons; what is accepted bears a signature that we made."""
    root, _, now = _pki()
    cut = int.from_bytes(data[:2], "big")
    leaf, issuer = data[2 : 2 + cut], data[2 + cut :]
    try:
        chain = [*parse_certificates(leaf, "leaf"), *(parse_certificates(issuer, "issuer") if issuer else [])]
    except InvalidInput:
        return
    for legacy in (False, True):
        terms = Terms(TrustBundle((root.certificate,)), Purpose.CLIENT, legacy=legacy)
        try:
            peer = verify(chain, terms, now, judge_offline(chain, terms.bundle, now))
        except VerificationFailed:
            continue
        assert peer.path[-1] == root.certificate
        for signed, by in pairwise(peer.path):
            signed.verify_directly_issued_by(by)


def fuzz_files(data: bytes) -> None:
    """Whatever a file holds, it is described, or refused as no file of ours."""
    try:
        facts = describe(data, "input")
    except InvalidInput:
        return
    text = render(facts)
    assert text.isprintable() or all(char.isprintable() or char == "\n" for char in text)
    json.dumps(facts)


def fuzz_requests_for_certificates(data: bytes) -> None:
    """A request is read or refused."""
    with suppress(InvalidInput, IssuanceRefused):
        parse_csr(data, "input")


def fuzz_crl(data: bytes) -> None:
    """A list is read or refused, and one that is read answers."""
    root, sub, now = _pki()
    try:
        lists = check_crls(parse_crls(data, "input"), [root.certificate, sub.certificate])
    except InvalidInput:
        return
    lists.failure(sub.certificate, root.certificate, now)


def fuzz_config(data: bytes) -> None:
    """A configuration is taken, or refused in words; so are rules."""
    text = data.decode("utf-8", "replace")
    for read in (lambda: parse_config(text, "handfast.toml", Path("/nowhere")), lambda: parse_rules(text, "allow.txt")):
        with suppress(InvalidInput):
            read()


def fuzz_capture(data: bytes) -> None:
    """A recording is read or refused."""
    with suppress(InvalidInput):
        read_capture(data, "input")


# The seeds


def _requests() -> list[bytes]:
    plain = b"GET /a/b?c=d HTTP/1.1\r\nHost: localhost:8443\r\nUser-Agent: x\r\nAccept: */*\r\n\r\n"
    return [
        plain,
        b"POST /u HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\nConnection: close, x-a\r\nX-A: 1\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n",
        b"GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\nClient-Identity: me\r\nSSL_CLIENT_S_DN: me\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\nCookie: a=b; c=d\r\nX-Client.Cert-Dn: me\r\n\r\n",
        b"GET http://a.test/x HTTP/1.1\r\nHost: a.test\r\n\r\n",
    ]


def _responses() -> list[bytes]:
    return [
        b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nContent-Type: text/plain\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nServer: x\r\ncontent-length: 0\r\nConnection: keep-alive\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 7\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
    ]


def _http2() -> list[bytes]:
    asked = ((":method", "GET"), (":scheme", "https"), (":authority", "a.test"), (":path", "/x?y"))
    call = ((":method", "POST"), (":scheme", "https"), (":path", "/g.S/M"), (":authority", "a.test:8443"))
    socket = ((":method", "CONNECT"), (":protocol", "websocket"), *asked[1:])
    return [
        _words(*asked, ("cookie", "a=b"), ("cookie", "c=d"), ("client-identity", "me"), ("accept", "*/*")),
        _words(*call, ("content-type", "application/grpc"), ("te", "trailers"), ("content-length", "17")),
        _words(*socket, ("sec-websocket-version", "13")),
        _words((":status", "200"), ("content-type", "application/grpc"), ("content-length", "5")),
        _words(("grpc-status", "0"), ("grpc-message", "")),
    ]


def _proxies() -> list[bytes]:
    pair = Endpoints(Address("192.0.2.1", 5000), Address("192.0.2.2", 443))
    six = Endpoints(Address("2001:db8::1", 5000), Address("2001:db8::2", 443))
    tls = TlsFacts("TLSv1.3", "TLS_AES_128_GCM_SHA256", b"h2", "a.test", True, "web", b"\x30\x03\x02\x01\x01")
    return [
        b"PROXY TCP4 192.0.2.1 192.0.2.2 5000 443\r\nGET",
        b"PROXY TCP6 2001:db8::1 2001:db8::2 5000 443\r\n",
        b"PROXY UNKNOWN whatever\r\n",
        proxy_v2(None),
        proxy_v2(pair, tls) + b"\x16\x03\x01",
        summed(proxy_v2(six, tls)),
        summed(proxy_v2(Endpoints(b"/run/a", b"/run/b"))),
    ]


def _hellos() -> list[bytes]:
    rows = json.loads((WIRE / "hellos.json").read_text())
    return [base64.b64decode(row["hello"]) for row in rows.values()]


def _recorded() -> list[bytes]:
    rows = [row for path in sorted((WIRE / "recordings").glob("*.json")) for row in json.loads(path.read_text())]
    return [bytes.fromhex(data) for _, kind, _, data in rows if kind == 22 and 4 <= len(data) // 2 <= LONGEST]


def _der(*certificates: x509.Certificate) -> bytes:
    first = certificates[0].public_bytes(Encoding.DER)
    return len(first).to_bytes(2, "big") + first + b"".join(one.public_bytes(Encoding.DER) for one in certificates[1:])


def _chains() -> list[bytes]:
    root, sub, _ = _pki()
    below = sub.client("spiffe://test/web", cn="web")
    names = [x509.DNSName("a.test"), x509.RFC822Name("a@a.test"), x509.UniformResourceIdentifier("urn:uuid:1")]
    constrained = root.sub(
        "Constrained", extra=[(x509.NameConstraints([x509.DNSName("a.test")], [x509.DNSName("b.a.test")]), True)]
    )
    return [
        _der(root.client("spiffe://test/web").certificate),
        _der(*below.presented),
        _der(constrained.leaf("a.test").certificate, constrained.certificate),
        _der(root.leaf("192.0.2.1", "a.test", cn="web").certificate),
        _der(root.leaf(extra=[(x509.SubjectAlternativeName(names), False)]).certificate),
    ]


def _lists() -> list[bytes]:
    root, _, now = _pki()
    builder = x509.CertificateRevocationListBuilder().issuer_name(root.certificate.subject).last_update(now)
    builder = builder.next_update(now + timedelta(days=1)).add_extension(x509.CRLNumber(1), False)
    entry = x509.RevokedCertificateBuilder().serial_number(7).revocation_date(now)
    entry = entry.add_extension(x509.CRLReason(x509.ReasonFlags.key_compromise), False)
    made = builder.add_revoked_certificate(entry.build()).sign(root.key, hashes.SHA256())
    return [made.public_bytes(Encoding.DER), made.public_bytes(Encoding.PEM)]


def _csrs() -> list[bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://test/web"), x509.DNSName("a.test")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, True)
    made = builder.sign(key, hashes.SHA256())
    return [made.public_bytes(Encoding.DER), made.public_bytes(Encoding.PEM)]


def _files() -> list[bytes]:
    _, sub, _ = _pki()
    return [*(seed[2:] for seed in _chains()[:1]), sub.certificate.public_bytes(Encoding.PEM), *_lists(), *_csrs()]


_CONFIG = """
state = "authority"
workers = 2
log = "json"
drain = "30s"
[limits]
handshake = "10s"
connections = 100
[admin]
listen = "127.0.0.1:9900"
[[listener]]
name = "front"
listen = "0.0.0.0:8443"
proxy_protocol_from = ["10.0.0.0/8"]
[[listener.site]]
names = ["a.test", "*.b.test"]
cert = "a.crt"
key = "a.key"
client_ca = "ca.crt"
client_auth = "optional"
to = "app"
[[listener.site.route]]
path = "/admin/**"
methods = ["GET"]
client_auth = "required"
allow = ["spiffe://test/ops"]
[upstream.app]
targets = ["127.0.0.1:8000", "127.0.0.1:8001"]
balance = "round_robin"
[upstream.app.health]
path = "/health"
interval = "5s"
"""


def _configs() -> list[bytes]:
    rules = b"# who\nspiffe://test/web\ndns:*.a.test GET,POST /api/**\nemail:a@b.test\nip:192.0.2.1\ncn:web # old\n"
    return [_CONFIG.encode(), rules]


def _captures() -> list[bytes]:
    ether = bytes(12) + b"\x08\x00"
    ip = bytes.fromhex("45000028000000004006000a7f0000017f000001")
    tcp = bytes.fromhex("1f9020fb0000000100000000500220000000") + b"\0\0"
    packet = ether + ip + tcp
    head = bytes.fromhex("d4c3b2a1020004000000000000000000ffff000001000000")
    stamp = bytes(8) + len(packet).to_bytes(4, "little") * 2
    block = b"\x0a\x0d\x0d\x0a\x1c\0\0\0\x4d\x3c\x2b\x1a\x01\0\0\0" + b"\xff" * 8 + b"\x1c\0\0\0"
    link = b"\x01\0\0\0\x14\0\0\0\x01\0\0\0\xff\xff\0\0\x14\0\0\0"
    return [head + stamp + packet, block + link]


TARGETS: dict[str, Target] = {
    "request": Target(fuzz_request, _requests),
    "requests": Target(fuzz_requests, lambda: [one + two + one for one in _requests() for two in _requests()[:2]]),
    "response": Target(fuzz_response, _responses),
    "chunks": Target(fuzz_chunks, lambda: [b"5\r\nhello\r\n0\r\n\r\nGET", b"a;x=y\r\n0123456789\r\n0\r\nA: b\r\n\r\n"]),
    "names": Target(fuzz_names, lambda: [b"a.test:443", b"[::1]:80", b"/a/../b;c%2f", b"192.0.2.1", b"xn--bcher-kva"]),
    "http2": Target(fuzz_http2, _http2),
    "proxy": Target(fuzz_proxy, _proxies),
    "hello": Target(fuzz_hello, _hellos),
    "messages": Target(fuzz_messages, _recorded),
    "chain": Target(fuzz_chain, _chains),
    "files": Target(fuzz_files, _files),
    "csr": Target(fuzz_requests_for_certificates, _csrs),
    "crl": Target(fuzz_crl, _lists),
    "config": Target(fuzz_config, _configs),
    "capture": Target(fuzz_capture, _captures),
}


# Without atheris


_INTERESTING = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\r\n",
    b"\r\n\r\n",
    b" ",
    b"\t",
    b":",
    b",",
    b"0",
    b"-1",
    b"\xff\xff",
)


def mutate(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """A neighbour of an input: a few small changes, now and then spliced with another."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        at = chance.randrange(len(made) + 1)
        match chance.randrange(7):
            case 0 if made:
                made[at % len(made)] ^= 1 << chance.randrange(8)
            case 1 if made:
                made[at % len(made)] = chance.randrange(256)
            case 2:
                del made[at : at + chance.choice((1, 2, 5, 40))]
            case 3:
                made[at:at] = chance.choice(_INTERESTING)
            case 4:
                made[at:at] = made[at : at + chance.choice((1, 4, 30))] * chance.choice((1, 2, 9))
            case 5:
                other = chance.choice(others)
                begin = chance.randrange(len(other) + 1)
                made[at:at] = other[begin : begin + chance.choice((4, 30, 200))]
            case _:
                made[at:at] = chance.randbytes(chance.choice((1, 2, 8)))
    return bytes(made[:LONGEST])


def blindly(target: Target, seconds: float, seed: int = 0) -> Iterator[bytes]:
    """Inputs without end but that of the time: each mutated from a seed, or from one of the last."""
    chance, seeds = random.Random(seed), target.seeds()
    pool = list(seeds)
    until = time.monotonic() + seconds
    yield from seeds
    while time.monotonic() < until:
        made = mutate(chance.choice(pool), seeds, chance)
        if chance.random() < 0.05:
            pool = [*pool[-200:], made, *seeds]
        yield made


@dataclass
class Found:
    """What a run came to. `crash`: the input that was too much, and what it did."""

    runs: int = 0
    crash: tuple[bytes, BaseException] | None = None


def run_blindly(target: Target, seconds: float, seed: int = 0) -> Found:
    """Try a target for so long, or until something is found."""
    found = Found()
    for data in blindly(target, seconds, seed):
        found.runs += 1
        try:
            target.fuzz(data)
        except Exception as error:
            found.crash = data, error
            break
    return found


# With atheris


def run_led(name: str, seconds: int) -> None:
    """Fuzz until the time is up or something is found. libFuzzer ends the process itself."""
    target = TARGETS[name]

    def one(data: bytes) -> None:
        try:
            target.fuzz(data)
        except Exception:
            print(f"crash of {name}, input {data.hex()}", flush=True)
            raise

    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(target.seeds()):
            (Path(folder) / f"{number:03}").write_bytes(seed)
        words = [
            sys.argv[0],
            f"-max_total_time={seconds}",
            f"-max_len={LONGEST}",
            "-verbosity=1",
            "-print_final_stats=1",
        ]
        _atheris.Setup([*words, f"-artifact_prefix={tempfile.gettempdir()}/", folder], one)
        _atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.harness")
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the mutations without atheris")
    parser.add_argument("--blind", action="store_true", help="without atheris, even where it is installed")
    words = parser.parse_args()
    if words.target == "all":
        more = ["--seconds", str(words.seconds), "--seed", str(words.seed), *(["--blind"] if words.blind else [])]
        codes = [subprocess.run([sys.executable, "-m", __spec__.name, name, *more], check=False) for name in TARGETS]
        return max(done.returncode for done in codes)
    if LED:
        run_led(words.target, words.seconds)
        return 0
    found = run_blindly(TARGETS[words.target], words.seconds, words.seed)
    print(f"{words.target}: {found.runs} inputs")
    if found.crash is None:
        return 0
    print(f"crash of {words.target}, input {found.crash[0].hex()}", file=sys.stderr)
    raise found.crash[1]


if __name__ == "__main__":
    sys.exit(main())
