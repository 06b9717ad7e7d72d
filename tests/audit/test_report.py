"""Reports: every format is what it says it is, holds every finding, and is not broken by what a server sent."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from handfast.audit.catalogue import CHECKS
from handfast.audit.model import Evidence, Finding, Outcome, Report, Severity, Verdict
from handfast.audit.report import as_json, render_html, render_junit, render_sarif, render_text, summary

HOSTILE = "<script>alert(1)</script>]]>&\"'\x00\x1b[2J\u202e"


def report() -> Report:
    """One finding of each verdict in turn, with what a hostile server could have sent."""
    verdicts = list(Verdict)
    findings = tuple(
        Finding(
            check,
            Outcome(verdicts[number % 4], f"because {HOSTILE}", (Evidence.of(HOSTILE, HOSTILE.encode()),)),
            0.25,
        )
        for number, check in enumerate(CHECKS)
    )
    return Report("127.0.0.1:8443", "TLS 1.3", "HTTP/1.1 200 OK", "2026-11-21T12:00:00+00:00", findings)


def test_json_has_everything() -> None:
    """Each finding is there, with what a program needs to act on it."""
    told = json.loads(json.dumps(as_json(report())))
    assert [one["id"] for one in told["findings"]] == [check.id for check in CHECKS]
    assert told["failed"] is True
    assert set(told["findings"][0]["remedies"]) == {"handfast", "nginx", "HAProxy", "Envoy", "Apache"}


def test_sarif_is_sarif() -> None:
    """The fields that SARIF 2.1.0 requires are there and consistent: 3.13, 3.14, 3.18, 3.19, 3.27, 3.49."""
    log = json.loads(render_sarif(report()))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    rules = [rule["id"] for rule in driver["rules"]]
    assert driver["name"]
    assert len(set(rules)) == len(rules) == len(CHECKS)
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
        assert result["message"]["text"]
        assert result["kind"] in ("pass", "fail", "notApplicable", "review")
        assert result["level"] in ("none", "note", "warning", "error")
        assert (result["kind"] == "fail") or result["level"] == "none"  # 3.27.10
        assert result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] == "127.0.0.1:8443"
    assert run["invocations"] == [{"executionSuccessful": True, "startTimeUtc": "2026-11-21T12:00:00Z"}]


def test_junit_parses_and_counts() -> None:
    """The counts are those of the cases; what was not decided is skipped, and never passed."""
    root = ElementTree.fromstring(render_junit(report()))
    (suite,) = root
    cases = list(suite)
    assert len(cases) == int(suite.attrib["tests"]) == len(CHECKS)
    failures = [failure for case in cases if (failure := case.find("failure")) is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    assert len(failures) == int(suite.attrib["failures"]) == sum(one.failed for one in report().findings)
    assert len(skipped) == int(suite.attrib["skipped"]) > 0
    assert "<script>" in failures[0].attrib["message"]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_runs_nothing() -> None:
    """Nothing is loaded, nothing runs, and what a server sent is text."""
    page = _Page()
    page.feed(render_html(report()))
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "<script>alert(1)</script>" in page.text
    assert page.tags.count("details") == len(CHECKS)
    assert all(check.id in page.text for check in CHECKS)


def test_the_terminal_is_not_moved() -> None:
    """No control character of a server reaches the terminal."""
    text = render_text(report())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
    assert text.rstrip().endswith(summary(report()))


@pytest.mark.parametrize("severity", Severity)
def test_only_what_is_worth_knowing_does_not_fail(severity: Severity) -> None:
    """A failed check fails the audit, whatever its severity but INFO."""
    check = next(one for one in CHECKS if one.severity is severity)
    finding = Finding(check, Outcome(Verdict.FAIL, "why"), 0.0)
    assert Report("x", "", "", "", (finding,)).failed is (severity is not Severity.INFO)
