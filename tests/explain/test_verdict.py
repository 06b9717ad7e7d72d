"""Verdicts on recorded handshakes: every alert, at its place, in both directions; and the words of reasons."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import Failure, InvalidInput, Reason
from handfast.explain.advice import advice_for
from handfast.explain.chain import load_chain, own_faults
from handfast.explain.model import Ending, Known, Recording, Sure, Verdict, Who
from handfast.explain.reasons import all_codes, meaning_of, who_acts
from handfast.explain.refusals import Shown, certificate_cause, weighed
from handfast.explain.scene import plain_speech, scene_of
from handfast.explain.story import as_json, explain
from handfast.explain.verdict import judge
from handfast.pki.verification import Purpose, TrustBundle
from handfast.wire.alerts import Alert
from handfast.wire.records import Chunk, Event, Side
from tests.wire.test_messages import NAMES, load

NEW, OLD = "openssl-ecdsa-13", "openssl-rsa-12"


def _recording(name: str, **more: Any) -> Recording:
    events = tuple(event for event in load(name) if event.kind != 21)
    made = Recording("192.0.2.7:8443", _now(name), Side.CLIENT, events, (), Ending.QUIET, done=0.1, waited=1.0)
    return replace(made, **more)


def _leaf(name: str) -> x509.Certificate:
    shown = [event.data for event in load(name) if event.kind == 22 and event.data[0] == 11]
    return load_chain([_first(shown[1], name)])[0]


def _first(message: bytes, name: str) -> bytes:
    at = 8 if name.endswith("13") else 7
    return message[at + 3 : at + 3 + int.from_bytes(message[at : at + 3], "big")]


def _now(name: str) -> datetime:
    return _leaf(name).not_valid_before_utc + timedelta(hours=1)


def _alerted(name: str, number: int, sender: Side = Side.SERVER, **known: Any) -> Verdict:
    recording = _recording(name, ending=Ending.BROKEN)
    events = (*recording.events, Event(0.2, sender, 21, bytes((2, number)), True, 2))
    return judge(replace(recording, events=events), Known(_now(name), **known))


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_handshake_works_and_says_what_mutual_tls_added(name: str) -> None:
    """Every recorded handshake is explained to the end: it works, with the messages that mutual TLS added."""
    found = explain(_recording(name), Known(_now(name), "localhost"))
    assert found.verdict.worked
    assert found.verdict.reason is None
    assert found.added.messages == ("server's CertificateRequest", "client's Certificate", "client's CertificateVerify")
    assert 0 < found.added.size < found.added.total
    assert all(step.purpose for step in found.steps)
    assert found.group
    assert as_json(found)["verdict"]["worked"] is True  # type: ignore[index]  # JSON


@pytest.mark.parametrize(
    ("number", "reason", "sure"),
    [
        (42, Reason.SEEN_REFUSED, Sure.POSSIBLE),
        (43, Reason.SEEN_REFUSED, Sure.POSSIBLE),
        (44, Reason.VERIFY_REVOKED, Sure.CERTAIN),
        (45, Reason.VERIFY_CRL_STALE, Sure.LIKELY),
        (46, Reason.SEEN_REFUSED, Sure.POSSIBLE),
        (48, Reason.VERIFY_CRL_MISSING, Sure.LIKELY),
        (49, Reason.POLICY_DENIED, Sure.CERTAIN),
        (51, Reason.TLS_BAD_PROOF, Sure.LIKELY),
        (70, Reason.TLS_VERSION, Sure.CERTAIN),
        (80, Reason.TLS_ALERT, Sure.POSSIBLE),
        (112, Reason.TLS_UNKNOWN_NAME, Sure.CERTAIN),
        (116, Reason.VERIFY_NO_CERTIFICATE, Sure.CERTAIN),
        (120, Reason.TLS_NO_COMMON, Sure.CERTAIN),
    ],
)
def test_an_alert_about_a_sound_certificate_is_weighed(number: int, reason: Reason, sure: Sure) -> None:
    """Where our certificate is sound and of an accepted authority, an alert means what is left to mean."""
    verdict = _alerted(NEW, number)
    assert (verdict.worked, verdict.reason, verdict.sure) == (False, reason, sure)


def test_the_same_alert_means_another_thing_with_another_certificate() -> None:
    """certificate_expired: our own look at the clock decides between an expired leaf and a stale list."""
    late = _leaf(NEW).not_valid_after_utc + timedelta(hours=1)
    recording = _recording(NEW)
    events = (*recording.events, Event(0.2, Side.SERVER, 21, bytes((2, 45)), True, 2))
    verdict = judge(replace(recording, events=events), Known(late))
    assert (verdict.reason, verdict.sure) == (Reason.VERIFY_EXPIRED, Sure.CERTAIN)


def _shown(chain: tuple[x509.Certificate, ...], late: bool, named: bool | None) -> Shown:
    now = chain[0].not_valid_after_utc + timedelta(hours=1 if late else -1)
    return Shown(Side.CLIENT, chain, own_faults(chain, Purpose.CLIENT, now), named)


@pytest.mark.parametrize(
    ("number", "late", "named", "reason", "sure"),
    [
        (49, True, None, Reason.VERIFY_EXPIRED, Sure.LIKELY),
        (49, False, None, Reason.POLICY_DENIED, Sure.CERTAIN),
        (42, True, True, Reason.VERIFY_EXPIRED, Sure.LIKELY),
        (42, False, False, Reason.VERIFY_UNKNOWN_ISSUER, Sure.LIKELY),
        (42, False, True, Reason.SEEN_REFUSED, Sure.POSSIBLE),
    ],
)
def test_what_is_wrong_with_a_certificate_outweighs_a_guess(
    number: int, late: bool, named: bool | None, reason: Reason, sure: Sure
) -> None:
    """An alert of many meanings means what is known to be wrong, where something is; else it stays what it says."""
    cause = certificate_cause(number, _shown((_leaf(NEW),), late, named))
    assert (cause.failure.reason, cause.sure) == (reason, sure)


def test_a_guessed_revocation_list_does_not_hide_an_expiry() -> None:
    """OpenSSL looks for the list before it looks at the clock, so both are told; a revocation, once said, is enough."""
    late = _shown((_leaf(NEW),), True, True)
    cause, others = weighed(certificate_cause(48, late), late)
    assert cause.failure.reason is Reason.VERIFY_CRL_MISSING
    assert [one.reason for one in others] == [Reason.VERIFY_EXPIRED]
    assert weighed(certificate_cause(44, late), late)[1] == ()


@pytest.mark.parametrize("alert", Alert, ids=lambda alert: alert.wire_name)
@pytest.mark.parametrize("name", [NEW, OLD])
@pytest.mark.parametrize("sender", list(Side))
def test_every_alert_from_either_side_has_a_verdict(alert: Alert, name: str, sender: Side) -> None:
    """Whichever side sends whichever alert, there is a verdict with a reason, a text and someone to act."""
    recording = replace(_recording(name), seen_from=sender.other, ending=Ending.BROKEN)
    events = (*recording.events, Event(0.2, sender, 21, bytes((2, alert.number)), True, 2))
    verdict = judge(replace(recording, events=events), Known(_now(name)))
    if alert in (Alert.CLOSE_NOTIFY, Alert.USER_CANCELED):
        assert verdict.worked
    else:
        assert not verdict.worked
        assert verdict.reason is not None
        assert verdict.text
        assert verdict.who is not Who.NOBODY


@given(st.lists(st.tuples(st.sampled_from(list(Side)), st.integers(18, 26), st.binary(max_size=80)), max_size=8))
def test_garbage_has_a_verdict(rows: list[tuple[Side, int, bytes]]) -> None:
    """Whatever is recorded, it is explained without an exception."""
    events = tuple(Event(0.0, side, kind, data) for side, kind, data in rows)
    chunks = tuple(Chunk(0.0, side, data) for side, _, data in rows if data)
    for seen in (None, *Side):
        for ending in Ending:
            recording = replace(_recording(NEW), events=events, chunks=chunks, seen_from=seen, ending=ending, done=None)
            assert explain(recording, Known(recording.began), TrustBundle((_leaf(NEW),))).verdict.text


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b'HTTP/1.1 403 Forbidden\r\n\r\n{"error": "verify.revoked", "id": "12ab"}', Reason.VERIFY_REVOKED),
        (b'HTTP/1.1 403 X\r\n\r\n{"error": "verify.no_certificate"}', Reason.VERIFY_NO_CERTIFICATE),
        (b'HTTP/1.1 400 X\r\n\r\n{"error": "http.host"}', Reason.HTTP_HOST),
        (b"HTTP/1.1 403 Forbidden\r\n\r\nRBAC: access denied", Reason.POLICY_DENIED),
        (
            b"HTTP/1.1 400 Bad\r\n\r\n<center>No required SSL certificate was sent</center>",
            Reason.VERIFY_NO_CERTIFICATE,
        ),
        (b"HTTP/1.1 403 Forbidden\r\n\r\nnot for you", None),
        (b'HTTP/1.1 403 Forbidden\r\n\r\n{"error": ["verify.revoked"]}', None),
        (b"220 ready", None),
    ],
)
def test_a_refusal_in_http_is_read(answer: bytes, reason: Reason | None) -> None:
    """handfast's, Envoy's and nginx's words are known; an application's own 403 is no refusal of TLS."""
    verdict = judge(_recording(NEW, answer=answer), Known(_now(NEW)))
    assert (verdict.reason, verdict.worked) == (reason, reason in (None, Reason.HTTP_HOST))


def test_a_close_right_after_the_handshake_is_a_likely_refusal() -> None:
    """A server that asks for a certificate and closes without a word has most likely refused it; what is wrong with
    it is told, and nothing where nothing is.
    """
    verdict = judge(_recording(NEW, ending=Ending.CUT), Known(_now(NEW)))
    assert (verdict.worked, verdict.reason, verdict.sure) == (False, Reason.SEEN_REFUSED, Sure.LIKELY)
    assert verdict.besides == ()
    late = _leaf(NEW).not_valid_after_utc + timedelta(hours=1)
    assert judge(_recording(NEW, ending=Ending.CUT), Known(late)).besides == (
        "the client's certificate has expired [verify.expired]",
    )


def test_a_smaller_hello_that_passes_points_to_the_network() -> None:
    """Where a hello of one packet is answered and one of two is not, something on the way is at fault."""
    cut = _recording(NEW, events=load(NEW)[:1], ending=Ending.CUT, done=None)
    maybe = judge(cut, Known(_now(NEW)))
    surely = judge(cut, Known(_now(NEW), small_works=True))
    assert (maybe.sure, surely.sure, surely.who) == (Sure.POSSIBLE, Sure.LIKELY, Who.NETWORK)
    assert "one packet" in surely.text


def test_two_faults_are_both_told() -> None:
    """A server that is not to be trusted and refuses us: the first fault leads, the second is not lost."""
    fault = Failure(Reason.VERIFY_EXPIRED, {"subject": "x"})
    verdict = _alerted(NEW, 44, peer_faults=(fault,))
    assert verdict.reason is Reason.VERIFY_EXPIRED
    assert any("verify.revoked" in other for other in verdict.besides)
    assert _alerted(NEW, 44, peer_faults=()).besides == ()


def test_a_scene_holds_what_was_shown() -> None:
    """The parts of a handshake are found at their places."""
    scene = scene_of(_recording(NEW), Known(_now(NEW)))
    assert scene.new
    assert scene.request is not None
    assert scene.proved == frozenset(Side)
    assert len(scene.ders(Side.CLIENT)) == 1


@pytest.mark.parametrize(
    ("data", "speech"), [(b"HTTP/1.0 200", "plain HTTP"), (b"POST / HTTP/1.1", "plain HTTP"), (b"\x16\x03\x01", "")]
)
def test_plain_speech_is_known_by_its_beginning(data: bytes, speech: str) -> None:
    """Protocols that are not TLS are known by how they begin; TLS is none of them."""
    assert plain_speech(data) == speech


# What reasons mean.


@pytest.mark.parametrize("code", all_codes())
def test_every_reason_has_a_meaning_and_someone_to_act(code: str) -> None:
    """`explain --reason` knows every code of the table, in words without holes."""
    meaning = meaning_of(code)
    assert meaning.code == code
    assert meaning.message
    assert "{" not in meaning.message + meaning.hint + meaning.advice
    assert isinstance(meaning.who, Who)
    assert meaning.as_json()["who"]


def test_a_code_that_is_none_is_refused() -> None:
    """A code that does not exist is an error that says where the list is."""
    with pytest.raises(InvalidInput) as refused:
        meaning_of("verify.nonsense")
    assert refused.value.reason is Reason.INPUT_REASON


def test_every_certificate_reason_has_advice() -> None:
    """Each verdict about a certificate says what to do, and its words fill."""
    for reason in Reason:
        if reason.code.startswith(("verify.", "ended.", "policy.")):
            for side in Side:
                advice = advice_for(reason, side)
                assert "{" not in advice.what + advice.todo + advice.command
                assert isinstance(advice.who, Who)
    assert who_acts(Reason.VERIFY_CRL_MISSING) is Who.SERVER
    assert advice_for(Reason.VERIFY_EXPIRED, Side.SERVER).what == "the server's certificate has expired"
    assert advice_for(Reason.VERIFY_EXPIRED, Side.CLIENT, "it").what == "it has expired"
