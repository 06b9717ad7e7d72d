"""What an explanation looks like: 80 columns, colour by choice, a page that fetches nothing, JSON without secrets."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from handfast.explain.draw import draw
from handfast.explain.model import Explanation, Known
from handfast.explain.page import render_page
from handfast.explain.story import as_json, explain, measured
from handfast.pki.verification import TrustBundle
from handfast.wire.records import Event, Side
from tests.explain.kit import CLIENTS, NOW, ROOT, Files, called
from tests.explain.test_verdict import _now, _recording
from tests.support.programs import PATH, must, s_server
from tests.wire.test_messages import NAMES, load

NASTY = "\x1b[31m<script>alert(1)</script>\u202e"


def _explained(name: str) -> Explanation:
    found = explain(_recording(name, events=load(name)), Known(_now(name), "localhost"))
    return measured(found, [0.002, 0.004, 0.003], [0.001])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("colour", [True, False])
def test_no_line_is_longer_than_80_columns(name: str, colour: bool) -> None:
    """The diagram of every recorded handshake fits a terminal; colour changes nothing but colour."""
    text = draw(_explained(name), colour=colour)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(len, plain.splitlines())) <= 80
    assert ("\x1b" in text) is colour
    assert plain == draw(_explained(name))
    assert "+ CertificateRequest" in plain
    assert "3.0 ms" in plain


def test_all_is_told_in_the_drawing() -> None:
    """Each message is there with its time, its size and what it is for; so is what TLS 1.3 changed."""
    text = " ".join(draw(_explained("openssl-ecdsa-13")).replace("│", " ").split())
    for words in ("premaster secret", "accepted authorities: CN=Recording Root", "Proof that the client holds the key"):
        assert words in text
    old = " ".join(draw(_explained("openssl-rsakx-12")).replace("│", " ").split())
    assert "can read the recording" in old


class _Reader(HTMLParser):
    """Notes what a page would fetch or run, and whether its elements close."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "line", "path"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def close(self) -> None:
        super().close()
        assert self._open == []


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_whole_and_fetches_nothing(name: str) -> None:
    """Every element closes; there is a diagram and something to unfold; no script, and no link out of the page."""
    page = render_page(_explained(name))
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert {"svg", "details", "style"} <= set(reader.tags)
    assert not {"script", "img", "link", "iframe", "object"} & set(reader.tags)
    assert all(link.startswith("#step-") for link in reader.links)
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|https?://", page)


def test_what_the_network_says_cannot_steer_the_page_or_the_terminal() -> None:
    """Control characters and markup in host names and protocols come out as text."""
    hello = bytearray(load("openssl-ecdsa-13")[0].data)
    at = hello.index(b"localhost")
    hello[at : at + 9] = b"\x1b[1m<b>\r\n"
    events = (Event(0, Side.CLIENT, 22, bytes(hello)), *load("openssl-ecdsa-13")[1:])
    found = explain(_recording("openssl-ecdsa-13", events=events), Known(NOW, "localhost"))
    found = replace(found, verdict=replace(found.verdict, text=NASTY, headline=NASTY))
    page, text = render_page(found), draw(explain(found.recording, Known(NOW)))
    assert "<b>" not in page
    assert "<script" not in page
    assert "\x1b" not in text
    assert "\r" not in text


def test_no_secret_is_in_what_is_shown(tmp_path: Path) -> None:
    """The key log of a live handshake is in none of the outputs, nor in the values' own text."""
    Files(tmp_path)
    words = ("-cert", "server.crt", "-key", "server.key", "-CAfile", "ca.crt", "-Verify", "3")
    with s_server(*words, folder=tmp_path) as (port, _):
        found = called(port, CLIENTS["good"])
    assert len(found.recording.keylog) >= 4
    shown = draw(found) + render_page(found) + json.dumps(as_json(found)) + repr(found)
    for line in found.recording.keylog:
        assert line.split()[-1].decode() not in shown


def test_the_json_has_all_that_is_drawn() -> None:
    """Every step, with its facts and its chain's checks, and the verdict."""
    found = explain(_recording("boringssl-rsa-13"), Known(_now("boringssl-rsa-13")), TrustBundle((ROOT.certificate,)))
    said: Any = json.loads(json.dumps(as_json(found)))
    assert [step["message"] for step in said["steps"]] == [step.name for step in found.steps]
    chain = next(step["chain"] for step in said["steps"] if step["message"] == "Certificate")
    assert {check["what"] for check in chain[0]["checks"]} >= {"signature", "validity", "purpose"}
    assert said["verdict"]["reason"] == "verify.unknown_issuer"


def test_a_browser_draws_the_page(tmp_path: Path) -> None:
    """Chromium draws the page, light and dark, wide and narrow, and the policy in it blocks nothing of it."""
    (tmp_path / "page.html").write_text(render_page(_explained("openssl-ecdsa-13")))
    line = ("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=360,900")
    env = {"HOME": str(tmp_path), "PATH": PATH, "LC_ALL": "C.UTF-8"}
    page = f"file://{tmp_path}/page.html"
    profile = f"--user-data-dir={tmp_path}/profile"
    dom = must(*line, profile, "--dump-dom", page, folder=tmp_path, env=env)
    assert dom.count("<details") >= 14
    must(*line, profile, f"--screenshot={tmp_path}/page.png", page, folder=tmp_path, env=env)
    assert (tmp_path / "page.png").stat().st_size > 10_000
