"""The reader of handshake messages: against recordings of four TLS stacks, and against garbage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from handfast.wire import messages as m
from handfast.wire import registry
from handfast.wire.extensions import render_name
from handfast.wire.records import MAX_HANDSHAKE, Event, MessageJoiner, RecordReader, Side

FOLDER = Path(__file__).parent / "recordings"  # how they were made: recordings/record.py
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
SEVENTEEN = 17


def load(name: str) -> tuple[Event, ...]:
    rows = json.loads((FOLDER / f"{name}.json").read_text())
    return tuple(Event(0, Side(sender), kind, bytes.fromhex(data), sealed) for sender, kind, sealed, data in rows)


def read(name: str) -> list[tuple[Side, m.Message]]:
    return [(event.sender, message) for event, message in m.read_events(load(name))]


ALL_MESSAGES = [event.data for name in NAMES for event in load(name) if event.kind == 22]


def test_the_recordings_are_there() -> None:
    """OpenSSL, NSS, Go and BoringSSL are among the recordings, in both versions, with both kinds of key."""
    assert len(NAMES) == SEVENTEEN
    for word in ("openssl", "nss", "nss-client", "go", "boringssl", "rsa", "ecdsa", "retry", "-12", "-13"):
        assert any(word in name for name in NAMES), word


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_handshake_is_read_whole(name: str) -> None:
    """Every message of every stack is read, and says what the recording was made with."""
    found = read(name)
    assert not [message for _, message in found if isinstance(message, m.Unreadable)]
    first = {(sender, type(message)): message for sender, message in reversed(found)}
    hello, answer = first[Side.CLIENT, m.ClientHello], first[Side.SERVER, m.ServerHello]
    assert isinstance(hello, m.ClientHello)
    assert isinstance(answer, m.ServerHello)
    assert hello.server_name == "localhost"
    assert answer.version == (m.TLS_1_3 if name.endswith("13") else m.TLS_1_2)
    assert registry.name_of(registry.VERSIONS, answer.version) in hello.versions
    assert answer.suite in hello.suites
    assert answer.suite in registry.SUITES
    request = first[Side.SERVER, m.CertificateRequest]
    assert isinstance(request, m.CertificateRequest)
    assert [render_name(one) for one in request.authorities] == ["CN=Recording Root"] * len(request.authorities)
    assert request.schemes
    for side, cn in ((Side.SERVER, "localhost"), (Side.CLIENT, "web")):
        shown, proof = first[side, m.Certificate], first.get((side, m.CertificateVerify))
        assert isinstance(shown, m.Certificate)
        certificate = x509.load_der_x509_certificate(shown.entries[0].der)
        assert certificate.subject.rfc4514_string() == f"CN={cn}"
        if side is Side.CLIENT or name.endswith("13"):
            assert isinstance(proof, m.CertificateVerify)
            assert ("rsa" if "-rsa" in name or "dhe" in name else "ecdsa") in registry.SCHEMES[proof.scheme]
        assert (side, m.Finished) in first


def test_a_retry_is_told_from_a_server_hello() -> None:
    """HelloRetryRequest has a ServerHello's form; the two are told apart, and the second hello has the new share."""
    hellos = [message for _, message in read("openssl-retry-13") if isinstance(message, m.ServerHello)]
    assert [hello.retry for hello in hellos] == [True, False]
    assert [m.values_of(hello, 51) for hello in hellos] == [("secp384r1",), ("secp384r1 (97 bytes)",)]
    shares = [m.values_of(message, 51) for _, message in read("openssl-retry-13") if isinstance(message, m.ClientHello)]
    assert shares[0][0] == "X25519MLKEM768 (1216 bytes)"
    assert shares[1] == ("secp384r1 (97 bytes)",)


@pytest.mark.parametrize(
    ("name", "group", "client_size"),
    [("openssl-dhe-12", None, None), ("openssl-ecdsa-12", 29, 33), ("nss-rsa-12", 29, 33)],
)
def test_a_key_exchange_before_tls_1_3_says_its_group(name: str, group: int | None, client_size: int | None) -> None:
    """ServerKeyExchange is read in both forms: a curve by its number, finite fields without one."""
    exchanges = [message for _, message in read(name) if isinstance(message, m.ServerKeyExchange)]
    assert [exchange.group for exchange in exchanges] == [group]
    assert exchanges[0].scheme in registry.SCHEMES
    sizes = [message.size for _, message in read(name) if isinstance(message, m.ClientKeyExchange)]
    assert client_size is None or sizes == [client_size]


def test_rsa_key_transport_has_no_server_key_exchange() -> None:
    """Where the client encrypts the premaster secret to the certificate, the server sends no half of its own."""
    found = [type(message) for _, message in read("openssl-rsakx-12")]
    assert m.ServerKeyExchange not in found
    assert m.ClientKeyExchange in found


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_or_altered_message_is_never_an_exception(name: str) -> None:
    """A message cut anywhere is unreadable; one with any byte altered is some message or unreadable."""
    for event in load(name):
        if event.kind != 22:
            continue
        for version in (m.TLS_1_2, m.TLS_1_3):
            for at in range(0, len(event.data), 7):
                assert isinstance(m.read_message(event.data[:at], version), m.Unreadable)
                flipped = bytearray(event.data)
                flipped[at] ^= 0x5A
                m.read_message(bytes(flipped), version, 0xC02C)


@given(st.binary(max_size=600), st.integers(0, 30), st.sampled_from([m.TLS_1_2, m.TLS_1_3]), st.integers(0, 0xFFFF))
def test_garbage_is_read_without_an_exception(body: bytes, kind: int, version: int, suite: int) -> None:
    """Whatever stands behind a right header, the reader answers with a message."""
    message = m.read_message(bytes((kind, *len(body).to_bytes(3, "big"))) + body, version, suite)
    assert message is not None


@given(st.sampled_from(ALL_MESSAGES), st.data())
def test_a_message_with_a_lie_in_it_is_read_without_an_exception(message: bytes, data: st.DataObject) -> None:
    """Lengths that lie, anywhere in a real message, do no harm."""
    at = data.draw(st.integers(4, max(4, len(message) - 1)))
    altered = message[:at] + data.draw(st.binary(min_size=1, max_size=3)) + message[at + 1 :]
    body = altered[4:]
    for version in (m.TLS_1_2, m.TLS_1_3):
        m.read_message(altered[:1] + len(body).to_bytes(3, "big") + body, version, 0x009F)


@given(st.binary(max_size=200))
def test_a_name_of_any_bytes_is_printable(name: bytes) -> None:
    """A distinguished name from the network cannot steer a terminal."""
    assert render_name(name).isprintable()


def test_a_header_that_lies_makes_a_message_unreadable() -> None:
    """A message is not read when its header and its length differ."""
    good = ALL_MESSAGES[0]
    assert isinstance(m.read_message(good), m.ClientHello)
    assert isinstance(m.read_message(good + b"x"), m.Unreadable)


@pytest.mark.parametrize(("level", "number", "fatal"), [(2, 40, True), (1, 0, False), (2, 90, False), (1, 48, True)])
def test_an_alert_is_read(level: int, number: int, fatal: bool) -> None:
    """An alert ends the connection or does not, whatever its level says (RFC 8446 6)."""
    [(_, alert)] = m.read_events((Event(0, Side.SERVER, 21, bytes((level, number))),))
    assert isinstance(alert, m.AlertMessage)
    assert (alert.number, alert.fatal) == (number, fatal)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_records_and_messages_come_whole_however_they_are_cut(size: int) -> None:
    """A stream cut anywhere, and messages that span records, give the same records and messages."""
    messages = ALL_MESSAGES[:6]
    handshake = b"".join(messages)
    pieces = [handshake[at : at + 100] for at in range(0, len(handshake), 100)]
    stream = b"".join(b"\x16\x03\x03" + len(piece).to_bytes(2, "big") + piece for piece in pieces)
    reader, joiner, found = RecordReader(), MessageJoiner(), []
    for at in range(0, len(stream), size):
        for record in reader.feed(stream[at : at + size]):
            assert (record.kind, record.version) == (22, 0x0303)
            found += list(joiner.feed(record.payload))
    assert found == messages
    assert not reader.broken


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 400 Bad Request\r\n", b"\x16\x03\x03\xff\xff", b"\x17\x02\x00\x00\x05hello"]
)
def test_what_is_no_record_breaks_the_reader(data: bytes) -> None:
    """The reader of records stops at what is none, and stays stopped."""
    reader = RecordReader()
    assert list(reader.feed(data)) == []
    assert reader.broken
    assert list(reader.feed(b"\x15\x03\x03\x00\x02\x02\x28")) == []


def test_a_message_without_end_is_not_kept() -> None:
    """A header that announces more than any handshake has ends the reading, not the memory."""
    joiner = MessageJoiner()
    assert list(joiner.feed(b"\x0b" + (MAX_HANDSHAKE + 1).to_bytes(3, "big"))) == []
    assert joiner.broken


@pytest.mark.parametrize(
    ("number", "name"), [(0x0A0A, "GREASE"), (0xFAFA, "GREASE"), (4588, "X25519MLKEM768"), (1, "0x0001")]
)
def test_numbers_have_names(number: int, name: str) -> None:
    """A group is shown by its registered name, as GREASE, or by its number."""
    assert registry.name_of(registry.GROUPS, number) == name
