"""Was the application reached? The judgement, as a table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.audit.model import MAX_EVIDENCE, Outcome, Verdict, failed, not_applicable, passed, shown, unclear
from handfast.audit.oracle import End, Reach, Reply, must_be_refused, reach, worst
from handfast.audit.wires import is_whole


def http(status: int, body: str = "") -> Reply:
    return Reply(True, f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode(), End.CLOSED)


OK = http(200, "Hello World")
GUARD = http(403, '{"error": "verify.expired", "id": "35485e42cf03"}')


@pytest.mark.parametrize(
    ("reply", "baseline", "wanted"),
    [
        (Reply(False, b"", End.ALERT, "unknown_ca"), None, Reach.NO),
        (Reply(True, b"", End.ALERT, "certificate_required"), OK, Reach.NO),
        (Reply(True, b"", End.CLOSED), None, Reach.NO),
        (Reply(True, b"", End.RESET), None, Reach.NO),
        (Reply(True, b"", End.SILENT), None, Reach.UNKNOWN),
        (Reply(True, b"", End.OPEN), OK, Reach.UNKNOWN),
        (Reply(False, b"", End.UNMADE, detail="no key"), None, Reach.UNKNOWN),
        (Reply(True, b"\0\1", End.CLOSED), None, Reach.YES),
        (Reply(True, b"+OK ready\r\n", End.ALERT, "internal_error"), None, Reach.YES),
        (http(200), None, Reach.YES),
        (http(302), OK, Reach.YES),
        (http(404), OK, Reach.YES),
        (http(502), None, Reach.YES),
        *((http(status), None, Reach.NO) for status in (400, 401, 403, 421, 495, 496)),
        (http(400), OK, Reach.NO),
        (http(503), OK, Reach.UNKNOWN),
        (http(429), None, Reach.UNKNOWN),
        (GUARD, None, Reach.NO),
        (GUARD, OK, Reach.NO),
    ],
)
def test_the_application_was_reached_or_not(reply: Reply, baseline: Reply | None, wanted: Reach) -> None:
    """Each kind of reply, beside each kind of baseline."""
    assert reach(reply, baseline)[0] is wanted
    verdict = {Reach.YES: Verdict.FAIL, Reach.NO: Verdict.PASS, Reach.UNKNOWN: Verdict.INCONCLUSIVE}[wanted]
    outcome = must_be_refused("an attack", reply, baseline)
    assert (outcome.verdict, outcome.evidence[0].sent) == (verdict, "an attack")


@given(data=st.binary(max_size=200), end=st.sampled_from(End), base=st.binary(max_size=50))
def test_the_judgement_is_total(data: bytes, end: End, base: bytes) -> None:
    """Whatever comes back, there is a judgement; and data that is no refusal never passes."""
    reply = Reply(True, data, end)
    reached, why = reach(reply, Reply(True, base, End.CLOSED))
    assert why
    if data and reply.status is None:
        assert reached is Reach.YES


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([passed("a"), passed("b")], Verdict.PASS),
        ([passed("a"), unclear("b")], Verdict.INCONCLUSIVE),
        ([passed("a"), unclear("b"), failed("c")], Verdict.FAIL),
        ([passed("a"), not_applicable("b")], Verdict.PASS),
        ([], Verdict.INCONCLUSIVE),
    ],
)
def test_several_tries_are_as_good_as_their_worst(outcomes: list[Outcome], wanted: Verdict) -> None:
    """One try that got through is a hole; one that says nothing takes the pass away."""
    assert worst(outcomes).verdict is wanted


@given(data=st.binary(max_size=2000) | st.text(max_size=2000))
def test_evidence_is_short_and_prints(data: bytes | str) -> None:
    """Whatever a server sent, evidence of it moves no cursor and fills no report."""
    text = shown(data)
    assert text.isprintable()
    assert len(text) <= 10 * MAX_EVIDENCE


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\no", False),
        (b"HTTP/1.1 200 OK\r\n\r\nok", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0", False),
        (b"ok", False),
    ],
)
def test_an_answer_is_known_to_be_whole(data: bytes, whole: bool) -> None:
    """Reading ends with the body, so that a server which keeps the connection open costs no wait."""
    assert is_whole(data) is whole
