"""Recordings: written for tshark, read from what tshark and editcap write, put together, opened, and never trusted."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import InvalidInput, Reason
from handfast.explain.capture import Stream, read_capture, write_capture
from handfast.explain.draw import draw
from handfast.explain.model import Ending, Known, Recording, Result
from handfast.explain.page import render_page
from handfast.explain.probe import call
from handfast.explain.story import as_json, explain
from handfast.explain.unseal import is_tls, parse_keylog, read_stream
from handfast.wire.records import Chunk, Side
from tests.explain.kit import CLIENTS, LIMITS, REQUEST, Files, caller
from tests.support.programs import must, s_server

WORDS = ("-cert", "server.crt", "-key", "server.key", "-CAfile", "ca.crt", "-Verify", "3", "-verify_return_error")
BEGAN = datetime(2026, 11, 21, 12, tzinfo=UTC)


def _recording(*rows: tuple[Side, bytes], place: str = "127.0.0.1:8443") -> Recording:
    chunks = tuple(Chunk(at / 1000, side, data) for at, (side, data) in enumerate(rows))
    return Recording(place, BEGAN, Side.CLIENT, (), chunks, Ending.QUIET)


def _made(folder: Path, name: str = "good", **offer: Any) -> Recording:
    Files(folder)
    with s_server(*WORDS, folder=folder) as (port, _):
        return call("127.0.0.1", port, caller(CLIENTS[name], **offer), LIMITS, REQUEST)


def _said(stream: Stream) -> dict[Side, bytes]:
    return {side: b"".join(chunk.data for chunk in stream.chunks if chunk.sender is side) for side in Side}


@pytest.mark.parametrize(
    ("offer", "suites"),
    [
        ({}, "TLS_AES_256_GCM_SHA384"),
        ({"only_tls12": True}, "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"),
    ],
)
def test_a_recording_that_was_written_is_read_and_opened_again(
    tmp_path: Path, offer: dict[str, Any], suites: str
) -> None:
    """What was recorded live and what is read from its pcap with the key log are the same handshake."""
    live = _made(tmp_path, **offer)
    [stream] = read_capture(write_capture(live), "x").streams
    read = read_stream(stream, parse_keylog(b"\n".join(live.keylog)))
    first, second = (explain(one, Known(live.began, "localhost")) for one in (live, read))
    assert first.suite == second.suite == suites
    messages = [step for step in first.steps if step.name != "application data"]
    assert sorted((s.sender, s.name, s.encrypted) for s in messages) == sorted(
        (s.sender, s.name, s.encrypted) for s in second.steps if s.name != "application data"
    )
    assert first.verdict.worked
    assert second.verdict.worked
    assert read.answer == live.answer


@pytest.mark.parametrize("suite", ["TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256"])
def test_each_cipher_suite_of_tls_1_3_opens(tmp_path: Path, suite: str) -> None:
    """The key log opens all three suites that are in use; a refusal is read from inside the encryption."""
    Files(tmp_path)
    with s_server(*WORDS, "-ciphersuites", suite, folder=tmp_path) as (port, _):
        live = call("127.0.0.1", port, caller(CLIENTS["expired"]), LIMITS, REQUEST)
    [stream] = read_capture(write_capture(live), "x").streams
    read = read_stream(stream, parse_keylog(b"\n".join(live.keylog)))
    found = explain(read, Known(live.began))
    assert (found.suite, found.verdict.reason) == (suite, Reason.VERIFY_EXPIRED)


def test_without_its_key_log_a_recording_stays_closed(tmp_path: Path) -> None:
    """The negative twin: without the secrets, TLS 1.3 shows its hellos and no certificate, and this is said."""
    live = _made(tmp_path, "expired")
    [stream] = read_capture(write_capture(live), "x").streams
    for keys in (b"", b"\n".join(line.replace(b" ", b" ff", 1) for line in live.keylog)):
        found = explain(read_stream(stream, parse_keylog(keys)), Known(live.began))
        assert found.sealed
        assert {step.name for step in found.steps if not step.encrypted} == {
            "ClientHello",
            "ServerHello",
            "ChangeCipherSpec",
        }
        assert "key log" in found.verdict.text
        assert (found.verdict.result, found.verdict.reason) == (Result.UNKNOWN, Reason.SEEN_SEALED)
        assert not found.verdict.worked
        assert json.dumps(as_json(found)).count('"worked": null') == 1
        assert "UNKNOWN  What came of it is encrypted [seen.sealed]" in draw(found)
        assert "Unknown: What came of it" in render_page(found)
    opened = explain(read_stream(stream, parse_keylog(b"\n".join(live.keylog))), Known(live.began))
    assert (opened.verdict.result, opened.verdict.reason) == (Result.FAILS, Reason.VERIFY_EXPIRED)


@pytest.mark.parametrize("only_tls12", [False, True])
def test_tshark_reads_and_opens_what_is_written(tmp_path: Path, only_tls12: bool) -> None:
    """tshark finds no fault in the packets, and with the key log every handshake message."""
    live = _made(tmp_path, only_tls12=only_tls12)
    (tmp_path / "x.pcap").write_bytes(write_capture(live))
    (tmp_path / "x.keys").write_bytes(b"\n".join(live.keylog) + b"\n")
    checks = ("-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE", "-o", "tls.keylog_file:x.keys")
    fields = ("-T", "fields", "-e", "tls.handshake.type", "-e", "_ws.malformed", "-e", "tcp.checksum.status")
    out = must("tshark", "-r", "x.pcap", *checks, *fields, folder=tmp_path)
    rows = [line.split("\t") for line in out.splitlines()]
    found = {int(number) for row in rows for number in row[0].split(",") if number}
    assert found == ({1, 2, 4, 8, 11, 13, 15, 20} if not only_tls12 else {1, 2, 4, 11, 12, 13, 14, 15, 16, 20})
    assert all(row[1] == "" for row in rows)
    assert {row[2] for row in rows} == {"1"}  # good
    errors = must("tshark", "-r", "x.pcap", "-Y", "tcp.analysis.flags", folder=tmp_path)
    assert errors.strip() == ""


def test_pcapng_with_its_secrets_inside_is_read(tmp_path: Path) -> None:
    """A pcapng file of Wireshark's tools, with the key log injected, opens without another file."""
    live = _made(tmp_path, "expired")
    (tmp_path / "x.pcap").write_bytes(write_capture(live))
    (tmp_path / "x.keys").write_bytes(b"\n".join(live.keylog) + b"\n")
    must("editcap", "-F", "pcapng", "--inject-secrets", "tls,x.keys", "x.pcap", "x.pcapng", folder=tmp_path)
    capture = read_capture((tmp_path / "x.pcapng").read_bytes(), "x")
    [stream] = capture.streams
    assert abs(stream.began - live.began.timestamp()) < 0.001
    found = explain(read_stream(stream, parse_keylog(capture.keylog)), Known(live.began))
    assert found.verdict.reason is Reason.VERIFY_EXPIRED


# Packets.


def _packets(pcap: bytes) -> list[bytes]:
    at, found = 24, []
    while at < len(pcap):
        size = struct.unpack_from("<I", pcap, at + 8)[0]
        found.append(pcap[at + 16 : at + 16 + size])
        at += 16 + size
    return found


def _pcap(packets: list[bytes], link: int = 101, order: str = "<") -> bytes:
    head = struct.pack(f"{order}IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, link)
    return head + b"".join(struct.pack(f"{order}IIII", 1, 0, len(p), len(p)) + p for p in packets)


HELLO = bytes(range(256)) * 40
TALK = ((Side.CLIENT, b"\x16\x03\x01\x02\x00\x01" + HELLO), (Side.SERVER, HELLO[::-1]), (Side.CLIENT, b"bye"))
SAID = {side: b"".join(data for sender, data in TALK if sender is side) for side in Side}


@pytest.mark.parametrize("place", ["127.0.0.1:8443", "[::1]:8443", "host.example:8443"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("link", "head"),
    [
        (101, b""),
        (1, b"\0" * 12 + b"\x08\x00"),
        (1, b"\0" * 12 + b"\x81\x00\0\7\x08\x00"),
        (0, b"\2\0\0\0"),
        (113, b"\0" * 16),
        (276, b"\0" * 20),
    ],
    ids=["raw", "ethernet", "vlan", "loopback", "sll", "sll2"],
)
def test_each_kind_of_frame_is_read(place: str, order: str, link: int, head: bytes) -> None:
    """Ethernet with and without VLAN, loopback, Linux cooked and raw IP, of both versions: the same connection."""
    if "[" in place:
        head = head.replace(b"\x08\x00", b"\x86\xdd")
    packets = [head + packet for packet in _packets(write_capture(_recording(*TALK, place=place)))]
    [stream] = read_capture(_pcap(packets, link, order), "x").streams
    assert _said(stream) == SAID
    assert stream.place.endswith(":8443")
    assert stream.ending is Ending.CUT


@pytest.mark.parametrize("seed", range(8))
def test_segments_out_of_order_and_twice_are_put_together(seed: int) -> None:
    """Packets that come late, twice or mixed up give the same bytes; none of them is lost or doubled."""
    packets = _packets(write_capture(_recording(*TALK)))
    chance = random.Random(seed)
    first, rest = packets[:3], packets[3:]
    mixed = rest + chance.sample(rest, 5)
    chance.shuffle(mixed)
    [stream] = read_capture(_pcap(first + mixed), "x").streams
    assert _said(stream) == SAID


def test_a_lost_segment_ends_the_stream_there() -> None:
    """Where a segment is missing, nothing behind it is read as if it followed."""
    packets = _packets(write_capture(_recording(*TALK)))
    del packets[5]
    [stream] = read_capture(_pcap(packets), "x").streams
    assert SAID[Side.CLIENT].startswith(_said(stream)[Side.CLIENT])
    assert len(_said(stream)[Side.CLIENT]) < len(SAID[Side.CLIENT])


def test_connections_are_kept_apart_and_found_in_the_middle() -> None:
    """Two connections in one file are two; one without its beginning is read from where it begins."""
    one, two = (_packets(write_capture(_recording(*TALK, place=f"127.0.0.1:{port}"))) for port in (8443, 9443))
    both = [packet for pair in zip(one, two, strict=True) for packet in pair]
    streams = read_capture(_pcap(both), "x").streams
    assert [stream.place for stream in streams] == ["127.0.0.1:8443", "127.0.0.1:9443"]
    assert [_said(stream) for stream in streams] == [SAID, SAID]
    [middle] = read_capture(_pcap(one[3:]), "x").streams
    assert _said(middle) == SAID
    assert is_tls(middle)


@pytest.mark.parametrize("data", [b"", b"\xd4\xc3\xb2\xa1", b"GIF89a" + b"\0" * 40, b"\x89PNG"])
def test_what_is_no_recording_is_refused(data: bytes) -> None:
    """A file of another kind is refused with a reason."""
    with pytest.raises(InvalidInput) as refused:
        read_capture(data, "x")
    assert refused.value.reason is Reason.INPUT_NOT_CAPTURE


@given(st.data())
def test_a_damaged_recording_is_read_without_an_exception(data: st.DataObject) -> None:
    """Bytes altered or cut anywhere in a file, of either format: what is readable is read, and nothing raises."""
    whole = _pcap(_packets(write_capture(_recording(*TALK))))
    block = struct.pack("<IIIHHq", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1) + struct.pack("<I", 28)
    block += struct.pack("<IIHHI", 1, 20, 101, 0, 0) + struct.pack("<I", 20)
    for packet in _packets(whole)[:4]:
        body = packet + b"\0" * (-len(packet) % 4)
        size = 32 + len(body)
        block += struct.pack("<IIIIIII", 6, size, 0, 0, 1, len(packet), len(packet)) + body + struct.pack("<I", size)
    for good in (whole, block):
        assert read_capture(good, "x").streams
        at = data.draw(st.integers(4, len(good) - 1))
        damaged = good[:at] + data.draw(st.binary(max_size=4)) + good[at + data.draw(st.integers(0, 4)) :]
        if len(damaged) >= 24:
            for stream in read_capture(damaged[: data.draw(st.integers(24, len(damaged)))], "x").streams:
                read_stream(stream, {})


@given(st.binary(max_size=300))
def test_a_key_log_of_any_bytes_is_read(data: bytes) -> None:
    """A key log with anything in it gives the secrets of its good lines, and no exception."""
    good = b"CLIENT_RANDOM " + b"ab" * 32 + b" " + b"cd" * 48 + b"\n"
    assert parse_keylog(data + b"\n" + good)[b"CLIENT_RANDOM", b"\xab" * 32] == b"\xcd" * 48


def test_an_altered_record_does_not_open(tmp_path: Path) -> None:
    """A byte changed in the encrypted part: the key log opens nothing from there on."""
    live = _made(tmp_path)
    chunks = list(live.chunks)
    at = next(at for at, chunk in enumerate(chunks) if chunk.sender is Side.SERVER)
    chunks[at] = replace(chunks[at], data=chunks[at].data[:-1] + bytes((chunks[at].data[-1] ^ 1,)))
    [stream] = read_capture(write_capture(replace(live, chunks=tuple(chunks))), "x").streams
    found = explain(read_stream(stream, parse_keylog(b"\n".join(live.keylog))), Known(live.began))
    assert "Finished" not in {step.name for step in found.steps if step.sender is Side.SERVER}
