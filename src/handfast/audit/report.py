"""Reports of an audit: for a terminal, as JSON, SARIF 2.1.0, JUnit XML, and one HTML page. Text out; no I/O.

What servers sent is untrusted: it is shown as text, escaped, and was cut short when it became evidence.
"""

from __future__ import annotations

import html
import json
import re
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import handfast
from handfast.audit.model import Check, Finding, Report, Severity, Verdict, visible

_SARIF_LEVEL = {
    Severity.CRITICAL: "error",
    Severity.HIGH: "error",
    Severity.MEDIUM: "warning",
    Severity.LOW: "note",
    Severity.INFO: "note",
}
# GitHub's reading of security-severity: over 9 critical, over 7 high, over 4 medium.
_SCORE = {
    Severity.CRITICAL: "9.5",
    Severity.HIGH: "8.0",
    Severity.MEDIUM: "5.5",
    Severity.LOW: "3.0",
    Severity.INFO: "0.0",
}
_SARIF_KIND = {
    Verdict.FAIL: "fail",
    Verdict.PASS: "pass",
    Verdict.NOT_APPLICABLE: "notApplicable",
    Verdict.INCONCLUSIVE: "review",
}
_MARK = {Verdict.FAIL: "FAIL", Verdict.INCONCLUSIVE: "????", Verdict.PASS: "pass", Verdict.NOT_APPLICABLE: "n/a "}
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0 2.2


def mark(finding: Finding) -> str:
    """The verdict in four letters."""
    return "note" if finding.word == "note" else _MARK[finding.outcome.verdict]


def summary(report: Report) -> str:
    """The counts in one line."""
    holes = sum(finding.failed for finding in report.findings)
    notes = report.count(Verdict.FAIL) - holes
    parts = [
        f"{holes} failed",
        f"{report.count(Verdict.PASS)} passed",
        f"{report.count(Verdict.INCONCLUSIVE)} inconclusive",
        f"{report.count(Verdict.NOT_APPLICABLE)} not applicable",
    ]
    said = ", ".join(parts) + (f", {notes} worth knowing" if notes else "")
    return f"{said}; {report.target} does not speak TLS" if report.no_tls else said


def untried(report: Report) -> list[str]:
    """What more could be tried, a line for each option that it takes."""
    return [f"{count} more check{'s' * (count > 1)} with {need.option}" for need, count in report.untried.items()]


def render_text(report: Report) -> str:
    """For a terminal: failures with evidence and remedies, the rest in two lines each."""
    lines = [f"{report.target}: {report.server}", f"an accepted request gets: {_line(report.baseline)}", ""]
    for finding in report.findings:
        lines.append(f"{mark(finding)}  {finding.check.id} ({finding.check.severity})")
        lines.append(f"      {_line(finding.outcome.why)}")
        if finding.outcome.verdict is Verdict.FAIL:
            lines += _detail(finding)
    more = untried(report)
    return "\n".join([*lines, *([""] * bool(more)), *more, "", summary(report), ""])


def as_json(report: Report) -> dict[str, Any]:
    """As JSON values."""
    return {
        "target": report.target,
        "server": report.server,
        "baseline": report.baseline,
        "began": report.began,
        "failed": report.failed,
        "no_tls": report.no_tls or None,
        "untried": {need.option: count for need, count in report.untried.items()},
        "findings": [_finding(one) for one in report.findings],
    }


def render_sarif(report: Report) -> str:
    """SARIF 2.1.0 (OASIS, 27 March 2020): every check is a rule, every finding a result."""
    rules = [_rule(finding.check) for finding in report.findings]
    results = [_result(number, finding, report.target) for number, finding in enumerate(report.findings)]
    driver = {
        "name": "handfast audit",
        "version": handfast.__version__,
        "rules": rules,
    }
    tool_run = {
        "tool": {"driver": driver},
        "results": results,
        "invocations": [
            {"executionSuccessful": not report.no_tls, "startTimeUtc": report.began.replace("+00:00", "Z")}
        ],
    }
    schema = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": [tool_run]}, indent=2) + "\n"


def render_junit(report: Report) -> str:
    """JUnit XML: a test case per check; what is inconclusive or not applicable is skipped."""
    failures = sum(finding.failed for finding in report.findings)
    skipped = report.count(Verdict.INCONCLUSIVE) + report.count(Verdict.NOT_APPLICABLE)
    seconds = sum(finding.seconds for finding in report.findings)
    counts = f'tests="{len(report.findings)}" failures="{failures}" errors="0" skipped="{skipped}" time="{seconds:.3f}"'
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f'<testsuites name="handfast audit" {counts}>']
    lines.append(f"<testsuite name={_attribute(report.target)} {counts} timestamp={_attribute(report.began[:19])}>")
    for finding in report.findings:
        group, _, name = finding.check.id.partition(".")
        head = f'classname={_attribute(f"handfast.audit.{group}")} name={_attribute(name)} time="{finding.seconds:.3f}"'
        lines.append(f"<testcase {head}>{_case(finding)}</testcase>")
    return "\n".join([*lines, "</testsuite>", "</testsuites>", ""])


def render_html(report: Report) -> str:
    """One page that needs nothing beside it, light and dark."""
    rows = "\n".join(_row(finding) for finding in report.findings)
    title = f"Audit of {html.escape(report.target)}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="lead {"bad" if report.failed or report.no_tls else "good"}">{html.escape(summary(report))}</p>
<dl>
<dt>Server</dt><dd>{html.escape(report.server)}</dd>
<dt>An accepted request gets</dt><dd>{html.escape(report.baseline)}</dd>
<dt>Begun</dt><dd>{html.escape(report.began)}, by handfast {html.escape(handfast.__version__)}</dd>
</dl>
{rows}
{"".join(f"<p>{html.escape(line)}</p>" for line in untried(report))}
</main>
</body>
</html>
"""


def _detail(finding: Finding) -> list[str]:
    check = finding.check
    lines = [f"      attack: {check.attack}"]
    for item in finding.outcome.evidence:
        lines += [f"        sent: {_line(item.sent)}", f"        got:  {_line(item.received)}"]
    lines += [f"      {product}: {remedy}" for product, remedy in check.remedies.items()]
    return [*lines, f"      see: {', '.join(check.references)}"]


def _finding(finding: Finding) -> dict[str, Any]:
    check, outcome = finding.check, finding.outcome
    return {
        "id": check.id,
        "verdict": finding.word,
        "severity": check.severity.value,
        "why": outcome.why,
        "attack": check.attack,
        "proves": check.proves,
        "references": list(check.references),
        "remedies": dict(check.remedies.items()),
        "evidence": [{"sent": item.sent, "received": item.received} for item in outcome.evidence],
        "seconds": round(finding.seconds, 3),
    }


def _rule(check: Check) -> dict[str, Any]:
    remedies = "\n".join(f"- {product}: {remedy}" for product, remedy in check.remedies.items())
    return {
        "id": check.id,
        "shortDescription": {"text": check.attack},
        "fullDescription": {"text": check.proves},
        "help": {"text": f"{remedies}\n{', '.join(check.references)}", "markdown": remedies},
        "defaultConfiguration": {"level": _SARIF_LEVEL[check.severity]},
        "properties": {"tags": ["security", *check.references], "security-severity": _SCORE[check.severity]},
    }


def _result(number: int, finding: Finding, target: str) -> dict[str, Any]:
    outcome = finding.outcome
    evidence = [{"sent": item.sent, "received": item.received} for item in outcome.evidence]
    return {
        "ruleId": finding.check.id,
        "ruleIndex": number,
        "kind": _SARIF_KIND[outcome.verdict],
        # 3.27.10: where the kind is not fail, the level is none.
        "level": _SARIF_LEVEL[finding.check.severity] if outcome.verdict is Verdict.FAIL else "none",
        "message": {"text": outcome.why},
        "locations": [{"logicalLocations": [{"fullyQualifiedName": target, "kind": "resource"}]}],
        "partialFingerprints": {"check/v1": f"{target} {finding.check.id}"},
        "properties": {"evidence": evidence, "seconds": round(finding.seconds, 3)},
    }


def _case(finding: Finding) -> str:
    why = finding.outcome.why
    if finding.failed:
        return f"<failure message={_attribute(why)}>{escape(_xml(chr(10).join(_detail(finding))))}</failure>"
    if finding.outcome.verdict in (Verdict.INCONCLUSIVE, Verdict.NOT_APPLICABLE):
        return f"<skipped message={_attribute(f'{finding.outcome.verdict}: {why}')}/>"
    return f"<system-out>{escape(_xml(why))}</system-out>"


def _row(finding: Finding) -> str:
    check, outcome = finding.check, finding.outcome
    said = html.escape
    evidence = "".join(
        f"<dt>sent</dt><dd><pre>{said(item.sent)}</pre></dd><dt>came back</dt><dd><pre>{said(item.received)}</pre></dd>"
        for item in outcome.evidence
    )
    remedies = "".join(f"<dt>{said(product)}</dt><dd>{said(remedy)}</dd>" for product, remedy in check.remedies.items())
    verdict = mark(finding).strip().replace("?", "")
    name = {"": "inconclusive", "n/a": "not applicable"}.get(verdict, verdict.lower())
    return f"""<details class="{finding.word}"{" open" if finding.failed else ""}>
<summary><b>{name}</b> <code>{said(check.id)}</code> <i>{check.severity}</i><br>{said(outcome.why)}</summary>
<p>{said(check.attack)} A pass shows: {said(check.proves)}</p>
<dl>{evidence}</dl>
<h2>What closes it</h2>
<dl>{remedies}</dl>
<p>{said(", ".join(check.references))}</p>
</details>"""


def _line(text: str) -> str:
    return visible(" ".join(text.split()))


def _xml(text: str) -> str:
    return _NOT_XML.sub("�", text)


def _attribute(text: str) -> str:
    return quoteattr(_xml(text))


_STYLE = """
:root { color-scheme: light dark; --bad: #b3261e; --good: #1b6e3a; --rule: #8886; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a80; --good: #7bd99b; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 60rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1rem; }
.lead { font-weight: 600; } .bad, .fail b { color: var(--bad); } .good, .pass b { color: var(--good); }
details { border-top: 1px solid var(--rule); padding: .5rem 0; overflow-wrap: anywhere; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; } dd { margin: 0; min-width: 0; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dt { font-weight: 600; } }
"""
