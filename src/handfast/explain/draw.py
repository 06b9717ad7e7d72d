"""An explanation on a terminal: a sequence diagram of 80 columns, the chains, and the verdict.

Colour is the caller's choice; without it nothing is lost. All text from the network was made printable before.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from handfast.explain.model import Check, Explanation, Link, Result, Step, Sure, Verdict, Who
from handfast.wire.records import Side

WIDTH = 80
_LEFT = 9  # columns of time before the client's line
_LANE = WIDTH - _LEFT - 2  # columns between the two lines
_INDENT = "    "

_STYLES = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36", "dim": "2", "bold": "1"}
_RESULTS = {Result.WORKS: "green", Result.FAILS: "red", Result.UNKNOWN: "yellow"}
_MARKS = {True: ("ok", "green"), False: ("NO", "red"), None: ("--", "yellow")}


def draw(explanation: Explanation, *, colour: bool = False) -> str:
    """Return the whole explanation as text, every line of which has at most 80 columns."""
    pen = _Pen(colour)
    lines = [*_head(explanation), "", *_diagram(explanation, pen), "", *_added(explanation, pen)]
    lines += ["", *_verdict(explanation.verdict, pen)]
    return "\n".join(line.rstrip() for line in lines)


class _Pen:
    """Puts colour on text, or does not. Text is cut and padded before it is coloured."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def __call__(self, text: str, *styles: str) -> str:
        if not self._colour or not styles:
            return text
        return f"\x1b[{';'.join(_STYLES[style] for style in styles)}m{text}\x1b[0m"


def _head(explanation: Explanation) -> Iterator[str]:
    recording = explanation.recording
    seen = {None: "from a recording", Side.CLIENT: "from the client's side", Side.SERVER: "from the server's side"}
    yield _cut(f"{recording.place}, {recording.began:%Y-%m-%d %H:%M:%S} UTC, seen {seen[recording.seen_from]}", WIDTH)
    settled = ", ".join(part for part in (explanation.version, explanation.suite, explanation.group) if part)
    if settled:
        yield _cut(settled, WIDTH)


def _diagram(explanation: Explanation, pen: _Pen) -> Iterator[str]:
    yield f"{'':<{_LEFT}}client{'server':>{_LANE - 4}}"
    yield f"{'ms':>{_LEFT - 1}} │{'':<{_LANE}}│"
    for step in explanation.steps:
        yield _arrow(step, pen)
        for line in _told(step):
            yield f"{'':<{_LEFT}}│{_INDENT}{pen(f'{line:<{_LANE - 4}}', 'dim')}│"
        for line, style in _chain(step.chain):
            yield f"{'':<{_LEFT}}│{_INDENT}{pen(f'{line:<{_LANE - 4}}', *style)}│"
        yield f"{'':<{_LEFT}}│{'':<{_LANE}}│"
    if not explanation.steps:
        yield f"{'':<{_LEFT}}│{'no message of TLS was seen':^{_LANE}}│"


def _arrow(step: Step, pen: _Pen) -> str:
    mark = "+ " if step.mutual else ""
    label = _cut(
        f" {mark}{step.name}, {step.size:,} byte{'s' * (step.size != 1)}{', encrypted' if step.encrypted else ''} ",
        _LANE - 8,
    )
    rule = "─" * (_LANE - len(label) - 3)
    styles = ["red", "bold"] if step.bad else ["cyan", "bold"] if step.mutual else ["bold"]
    shown = pen(label, *styles)
    time = f"{step.at:>{_LEFT - 1}.1f} "
    if step.sender is Side.CLIENT:
        return f"{time}│──{shown}{rule}▶│"
    return f"{time}│◀{rule}{shown}──│"


def _told(step: Step) -> Iterator[str]:
    yield from textwrap.wrap(step.purpose, _LANE - 6)
    for key, value in step.facts:
        yield from textwrap.wrap(f"{key}: {value}", _LANE - 8, initial_indent="· ", subsequent_indent="    ")


def _chain(chain: tuple[Link, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    width = _LANE - 6
    for at, link in enumerate(chain):
        depth = "  " * min(at, 6)
        corner = "" if at == 0 else "└ "
        where = "" if link.sent else " (in your bundle, not sent)"
        yield _cut(f"{depth}{corner}{link.label}{where}", width), ("bold",)
        inner = depth + ("  " if at else "") + "  "
        if link.key:
            yield _cut(f"{inner}{link.key}; issued by {link.issuer or 'nobody'}", width), ("dim",)
        for check in link.checks:
            yield from _check(check, inner, width)


def _check(check: Check, inner: str, width: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    mark, colour = _MARKS[check.good]
    first = f"{inner}{mark} {check.what}: "
    for line in textwrap.wrap(check.text, width, initial_indent=first, subsequent_indent=f"{inner}   "):
        yield line, (colour,)


def _added(explanation: Explanation, pen: _Pen) -> Iterator[str]:
    added = explanation.added
    if explanation.sealed:
        yield "What mutual TLS added cannot be seen: it is encrypted."
        return
    if not added.messages and not explanation.verdict.worked:
        yield "The handshake did not get as far as what mutual TLS adds."
        return
    if not added.messages:
        yield "Mutual TLS added nothing here: no client certificate was asked for."
        return
    share = f" ({added.size * 100 // added.total} % of the handshake's {added.total:,})" if added.total else ""
    yield pen("What mutual TLS added to TLS (marked +)", "bold")
    yield from textwrap.wrap(
        f"messages: {', '.join(added.messages)}", WIDTH - 2, initial_indent="  ", subsequent_indent="    "
    )
    yield f"  bytes:    {added.size:,}{share}"
    if added.mutual_ms is not None and added.plain_ms is not None:
        text = (
            f"time: {added.mutual_ms:.1f} ms from connecting to the end of the client's handshake with a certificate,"
            f" {added.plain_ms:.1f} ms without one (medians of {added.runs} each, on this endpoint)"
        )
        yield from textwrap.wrap(text, WIDTH - 2, initial_indent="  ", subsequent_indent="    ")


def _verdict(verdict: Verdict, pen: _Pen) -> Iterator[str]:
    mark, colour = verdict.result.upper(), _RESULTS[verdict.result]
    code = f" [{verdict.reason.code}]" if verdict.reason is not None else ""
    headline = textwrap.wrap(f"{mark}  {verdict.headline}{code}", WIDTH)
    yield from (pen(line, colour, "bold") for line in headline)
    yield from textwrap.wrap(verdict.text, WIDTH - 2, initial_indent="  ", subsequent_indent="  ")
    if verdict.sure is not Sure.CERTAIN:
        yield f"  How sure: {verdict.sure}."
    for fault in verdict.besides:
        yield from textwrap.wrap(f"also: {fault}", WIDTH - 4, initial_indent="  ", subsequent_indent="        ")
    for other in verdict.also:
        yield from textwrap.wrap(f"or: {other}", WIDTH - 4, initial_indent="  ", subsequent_indent="      ")
    if verdict.who is not Who.NOBODY:
        yield f"  Who must act: {verdict.who}"
    if verdict.command:
        yield f"  next: {verdict.command}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
