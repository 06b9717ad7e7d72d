"""The table of reasons: complete, used, and filled with the facts it asks for."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest

from handfast.errors import Exit, Failure, Reason

SOURCES = [path.read_text() for path in (Path(__file__).parent.parent / "src").rglob("*.py")]


def test_codes_are_stable_words() -> None:
    """Each reason has a code of its own, of lower-case words with one dot at most."""
    codes = [reason.code for reason in Reason]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)?", code) for code in codes)


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.code)
def test_every_reason_is_used(reason: Reason) -> None:
    """A reason that nothing gives would be documentation of what does not happen."""
    uses = sum(len(re.findall(rf"\bReason\.{reason.name}\b", source)) for source in SOURCES)
    assert uses > 0, f"{reason.name} is never given"


def test_every_used_reason_exists() -> None:
    """Every Reason.X in the code is in the table."""
    used = {name for source in SOURCES for name in re.findall(r"\bReason\.([A-Z][A-Z0-9_]+)\b", source)}
    assert used <= {reason.name for reason in Reason}


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.code)
def test_messages_fill(reason: Reason) -> None:
    """A message is a sentence once its facts are in, and never fails for one that is missing."""
    fields = {field for _, field, _, _ in string.Formatter().parse(reason.value.message) if field}
    filled = Failure(reason, {re.split(r"[!:]", field)[0]: "x" for field in fields}).message
    assert "{" not in filled
    assert "?" not in filled
    assert Failure(reason).message


def test_refusals_over_http_have_a_status() -> None:
    """What a client of the guard may meet has a status from 400 up; nothing ends a command with 0 by mistake."""
    for reason in Reason:
        if reason.code.startswith(("verify.", "http.", "upstream.")):
            assert 400 <= reason.http <= 599, reason.code
        if reason.code.startswith(("verify.", "issue.", "input.", "store.")):
            assert reason.exit is not Exit.OK, reason.code
