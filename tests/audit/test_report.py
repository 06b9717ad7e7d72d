"""Reports: every format is what it says it is, holds every finding, and is not broken by what a server sent."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from handfast.audit.catalogue import CHECKS
from handfast.audit.model import Evidence, Finding, Need, Outcome, Report, Severity, Verdict
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


def test_a_note_is_no_fail_in_any_format() -> None:
    """What is only worth knowing is a note in JSON, SARIF and JUnit, so that who counts failures agrees with the exit
    code; a hole is a fail in each.
    """
    for severity, word, level in ((Severity.INFO, "note", "note"), (Severity.HIGH, "fail", "error")):
        check = next(one for one in CHECKS if one.severity is severity)
        one = Report("x:1", "", "", "", (Finding(check, Outcome(Verdict.FAIL, "why"), 0.0),))
        told = as_json(one)
        assert ([f["verdict"] for f in told["findings"]], told["failed"]) == ([word], word == "fail")
        assert json.loads(render_sarif(one))["runs"][0]["results"][0]["level"] == level
        assert ElementTree.fromstring(render_junit(one)).attrib["failures"] == str(int(word == "fail"))
        assert f'<details class="{word}"' in render_html(one)
        assert f"{word.upper() if word == 'fail' else word}  {check.id}" in render_text(one)


def test_what_could_be_tried_with_more_is_counted() -> None:
    """The end of a report says how many checks more each option gives; what no option gives is not counted."""
    whys = (Need.AUTHORITY.value, Need.AUTHORITY.value, Need.ECHO.value, Need.HTTP.value, "no ticket")
    findings = tuple(
        Finding(check, Outcome(Verdict.NOT_APPLICABLE, why), 0.0) for check, why in zip(CHECKS, whys, strict=False)
    )
    one = Report("x:1", "", "", "", findings)
    lines = render_text(one).splitlines()
    assert lines[-4:] == ["2 more checks with --ca F --ca-key F", "1 more check with --echo PATH", "", summary(one)]
    assert as_json(one)["untried"] == {"--ca F --ca-key F": 2, "--echo PATH": 1}
    assert "2 more checks with --ca F --ca-key F" in render_html(one)
    assert "more check" not in render_text(replace(one, findings=findings[3:]))


def test_a_server_without_tls_is_said_in_every_format() -> None:
    """The last line, the page, JSON and SARIF say that no TLS was spoken; where it was, none does."""
    one = Report("x:1", "no TLS: it hung up", "", "", (), "it hung up")
    for report_, without in ((one, True), (replace(one, server="TLS 1.3", no_tls=""), False)):
        assert render_text(report_).rstrip().endswith("x:1 does not speak TLS") is without
        assert ("does not speak TLS" in render_html(report_)) is without
        assert (as_json(report_)["no_tls"] is not None) is without
        ran = json.loads(render_sarif(report_))["runs"][0]["invocations"][0]["executionSuccessful"]
        assert ran is not without


@pytest.mark.parametrize("severity", Severity)
def test_only_what_is_worth_knowing_does_not_fail(severity: Severity) -> None:
    """A failed check fails the audit, whatever its severity but INFO."""
    check = next(one for one in CHECKS if one.severity is severity)
    finding = Finding(check, Outcome(Verdict.FAIL, "why"), 0.0)
    assert Report("x", "", "", "", (finding,)).failed is (severity is not Severity.INFO)
