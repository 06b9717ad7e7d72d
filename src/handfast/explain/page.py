"""An explanation as one HTML page: an SVG sequence diagram, every message to unfold, light and dark.

Self-contained: it fetches nothing and runs no script, and says so to the browser (Content-Security-Policy). All text
from the network is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from handfast.explain.model import Check, Explanation, Link, Result, Step, Sure, Verdict, Who
from handfast.wire.records import Side

# In units of the drawing, which scales with the page.
_WIDTH, _LEFT, _RIGHT, _ROW, _TOP = 400, 52, 388, 40, 44

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --soft: #57606a; --line: #d0d7de;
  --good: #116329; --bad: #b3261e; --mutual: #0550ae; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --back: #0d1117; --soft: #9198a1; --line: #3d444d;
  --good: #56d364; --bad: #ff7b72; --mutual: #79c0ff; --card: #161b22; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; } code, pre { font: .9em ui-monospace, monospace; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.mutual { color: var(--mutual); }
.verdict { border: 1px solid var(--line); border-left: .4rem solid var(--good); border-radius: .4rem;
  background: var(--card); padding: .75rem 1rem; margin: 1rem 0; }
.verdict.failed { border-left-color: var(--bad); } .verdict.unknown { border-left-color: var(--soft); }
.verdict h2 { margin: 0 0 .25rem; } pre { background: var(--back); border: 1px solid var(--line); border-radius: .4rem;
  padding: .5rem .75rem; white-space: pre-wrap; margin: .5rem 0; }
svg { display: block; width: 100%; max-width: 40rem; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--text); } svg .time { font-size: 10px; fill: var(--soft); }
svg .life { stroke: var(--line); stroke-width: 2; } svg .arrow { stroke: var(--text); stroke-width: 1.4; }
svg .head { fill: var(--text); } svg .mutual text { fill: var(--mutual); font-weight: 600; }
svg .mutual .arrow { stroke: var(--mutual); } svg .mutual .head { fill: var(--mutual); }
svg .bad text { fill: var(--bad); font-weight: 600; } svg .bad .arrow { stroke: var(--bad); }
svg .bad .head { fill: var(--bad); } svg .sealed .arrow { stroke-dasharray: 5 3; }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .4rem 0; padding: .4rem .75rem; }
details details { background: var(--card); } summary { cursor: pointer; }
dl { margin: .4rem 0; display: grid; grid-template-columns: minmax(6rem, 11rem) 1fr; gap: .15rem .75rem; }
dt { color: var(--soft); } dd { margin: 0; } ul { margin: .4rem 0; padding-left: 1.2rem; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dd { margin: 0 0 .4rem 0; } }
"""
_MARKS = {True: ("✓", "good"), False: ("✗", "bad"), None: ("?", "soft")}


def render_page(explanation: Explanation) -> str:
    """Return the whole explanation as an HTML document."""
    recording = explanation.recording
    title = escape(f"{recording.place}: {explanation.verdict.headline}")
    settled = ", ".join(part for part in (explanation.version, explanation.suite, explanation.group) if part)
    seen = "a recording" if recording.seen_from is None else f"the {recording.seen_from}'s side"
    steps = "".join(_step(at, step) for at, step in enumerate(explanation.steps))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>A handshake with {escape(recording.place)}</h1>\n"
        f'<p class="soft">{recording.began:%Y-%m-%d %H:%M:%S} UTC, seen from {seen}. {escape(settled)}</p>\n'
        f"{_verdict(explanation.verdict)}<h2>What was said</h2>\n{_diagram(explanation)}"
        '<p class="soft">Blue, with a plus: what mutual TLS adds. Dashed: encrypted on the way.</p>\n'
        f"<h2>Each message</h2>\n{steps}{_added(explanation)}</body>\n</html>\n"
    )


def _verdict(verdict: Verdict) -> str:
    kind = {Result.WORKS: "", Result.FAILS: " failed", Result.UNKNOWN: " unknown"}[verdict.result]
    word = verdict.result.capitalize()
    code = f' <code class="soft">{escape(verdict.reason.code)}</code>' if verdict.reason is not None else ""
    lines = [f"<h2>{word}: {escape(verdict.headline)}{code}</h2>", f"<p>{escape(verdict.text)}</p>"]
    if verdict.besides:
        lines.append(f"<p>Also:</p><ul>{''.join(f'<li>{escape(fault)}</li>' for fault in verdict.besides)}</ul>")
    if verdict.who is not Who.NOBODY:
        lines.append(f"<p><strong>Who must act:</strong> {escape(str(verdict.who))}</p>")
    if verdict.command:
        lines.append(f"<pre>{escape(verdict.command)}</pre>")
    if verdict.sure is not Sure.CERTAIN or verdict.also:
        others = "".join(f"<li>{escape(other)}</li>" for other in verdict.also)
        also = f" It could also be that:</p><ul>{others}</ul>" if others else "</p>"
        lines.append(f'<p class="soft">This is {escape(str(verdict.sure))}.{also}')
    return f'<section class="verdict{kind}">{"".join(lines)}</section>\n'


def _diagram(explanation: Explanation) -> str:
    height = _TOP + _ROW * max(len(explanation.steps), 1) + 16
    arrows = "".join(_arrow(at, step) for at, step in enumerate(explanation.steps))
    lives = "".join(f'<line class="life" x1="{x}" y1="28" x2="{x}" y2="{height - 4}"/>' for x in (_LEFT, _RIGHT))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="sequence of messages">'
        f'<text x="{_LEFT}" y="18" text-anchor="middle">client</text>'
        f'<text x="{_RIGHT}" y="18" text-anchor="end">server</text>'
        f'<text class="time" x="{_LEFT - 10}" y="34" text-anchor="end">ms</text>{lives}{arrows}</svg>\n'
    )


def _arrow(at: int, step: Step) -> str:
    y = _TOP + _ROW * at + 20
    kind = " ".join(name for name, on in (("bad", step.bad), ("mutual", step.mutual), ("sealed", step.encrypted)) if on)
    to_server = step.sender is Side.CLIENT
    tip, back = (_RIGHT - 2, _RIGHT - 11) if to_server else (_LEFT + 2, _LEFT + 11)
    start = _LEFT if to_server else _RIGHT
    anchor, x = ("start", _LEFT + 14) if to_server else ("end", _RIGHT - 14)
    label = escape(f"{'+ ' if step.mutual else ''}{_short(step.name)}, {step.size:,} B")
    return (
        f'<a href="#step-{at}"><g class="{kind}"><title>{escape(step.purpose)}</title>'
        f'<text class="time" x="{_LEFT - 10}" y="{y + 3}" text-anchor="end">{step.at:.1f}</text>'
        f'<text x="{x}" y="{y - 6}" text-anchor="{anchor}">{label}</text>'
        f'<line class="arrow" x1="{start}" y1="{y}" x2="{back}" y2="{y}"/>'
        f'<path class="head" d="M{tip} {y} L{back} {y - 4} L{back} {y + 4} Z"/></g></a>'
    )


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:39]}…"


def _step(at: int, step: Step) -> str:
    kind = "bad" if step.bad else "mutual" if step.mutual else ""
    sealed = ", encrypted" if step.encrypted else ""
    size = f"{step.size:,} byte{'s' * (step.size != 1)}"
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in step.facts)
    chain = "".join(_link(link) for link in step.chain)
    opened = " open" if step.bad or any(check.good is False for link in step.chain for check in link.checks) else ""
    return (
        f'<details id="step-{at}"{opened}><summary><span class="{kind}">{"+ " if step.mutual else ""}'
        f'{escape(step.name)}</span> <span class="soft">from the {step.sender}, {size}{sealed},'
        f" at {step.at:.1f} ms</span></summary><p>{escape(step.purpose)}</p>"
        f"{f'<dl>{facts}</dl>' if facts else ''}{chain}</details>\n"
    )


def _link(link: Link) -> str:
    checks = "".join(_check(check) for check in link.checks)
    where = "" if link.sent else ' <span class="soft">(in your bundle, not sent)</span>'
    marks = "".join(f'<span class="{_MARKS[check.good][1]}">{_MARKS[check.good][0]}</span>' for check in link.checks)
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in _certificate_facts(link))
    return f"<details><summary>{escape(link.label)} {marks}{where}</summary><ul>{checks}</ul><dl>{facts}</dl></details>"


def _certificate_facts(link: Link) -> Iterator[tuple[str, str]]:
    yield "names", ", ".join(link.names) or "none"
    for key, value in (("subject", link.subject), ("issuer", link.issuer), ("key", link.key)):
        if value:
            yield key, value
    if link.not_before is not None and link.not_after is not None:
        yield "valid", f"{link.not_before:%Y-%m-%d %H:%M} to {link.not_after:%Y-%m-%d %H:%M} UTC"
    yield "serial", link.serial
    yield "SHA-256", link.sha256


def _check(check: Check) -> str:
    mark, kind = _MARKS[check.good]
    return f'<li><span class="{kind}">{mark} {escape(check.what)}</span>: {escape(check.text)}</li>'


def _added(explanation: Explanation) -> str:
    added = explanation.added
    if explanation.sealed:
        return "<h2>What mutual TLS added</h2><p>It cannot be seen: it is encrypted.</p>\n"
    if not added.messages and not explanation.verdict.worked:
        return "<h2>What mutual TLS added</h2><p>The handshake did not get that far.</p>\n"
    if not added.messages:
        return "<h2>What mutual TLS added</h2><p>Nothing: no client certificate was asked for.</p>\n"
    share = f" ({added.size * 100 // added.total} % of {added.total:,})" if added.total else ""
    rows = [("messages", ", ".join(added.messages)), ("bytes of handshake", f"{added.size:,}{share}")]
    if added.mutual_ms is not None and added.plain_ms is not None:
        rows.append(("time with a certificate", f"{added.mutual_ms:.1f} ms, median of {added.runs}"))
        rows.append(("time without", f"{added.plain_ms:.1f} ms, median of {added.runs}"))
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in rows)
    return f"<h2>What mutual TLS added</h2><dl>{facts}</dl>\n"
