"""The policy language and its decisions, as tables."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handfast.errors import InvalidInput, Reason
from handfast.pki import Purpose, Terms, TrustBundle, VerifiedPeer, verify
from handfast.policy import ALLOW_ANY, Effect, Policy, Request, decide, parse_policy, parse_rule, rule_for
from handfast.tls.judge import judge_offline
from tests.support.certs import Ca

ROOT = Ca.root()


def _peer(*names: str, cn: str | None = None, ca: Ca = ROOT, bundle: TrustBundle | None = None) -> VerifiedPeer:
    terms = Terms(bundle or TrustBundle((ca.certificate,)), Purpose.CLIENT)
    chain, now = ca.leaf(*names, cn=cn).presented, datetime.now(UTC)
    return verify(chain, terms, now, judge_offline(chain, terms.bundle, now))


WEB = _peer("spiffe://td/web")
DEEP = _peer("spiffe://td/web/blue/7")
HOST = _peer("a.internal", cn="admin")
MAIL = _peer("alice@corp.example")


@pytest.mark.parametrize(
    ("rule", "peer", "allowed"),
    [
        ("web", WEB, True),
        ("api", WEB, False),
        ("spiffe://td/web", WEB, True),
        ("spiffe://other/web", WEB, False),
        ("spiffe://td/*", WEB, True),
        ("spiffe://td/*", DEEP, False),
        ("spiffe://td/**", DEEP, True),
        ("spiffe://td/web/*/7", DEEP, True),
        ("spiffe://td/web/*", DEEP, False),
        ("dns:*.internal", HOST, True),
        ("dns:*.nal", HOST, False),
        ("cn:admin", HOST, True),
        ("admin", HOST, False),
        ("dns:admin", HOST, False),
        ("email:*@corp.example", MAIL, True),
        ("email:*@example", MAIL, False),
        ("any", MAIL, True),
    ],
)
def test_who_is_meant(rule: str, peer: VerifiedPeer, allowed: bool) -> None:
    """A pattern means exactly the names it says."""
    assert decide(parse_policy([rule], "td"), peer, Request(b"GET", b"/")).allowed is allowed


@pytest.mark.parametrize(
    ("method", "path", "text"),
    [
        (b"POST", b"/x", "spiffe://td/web POST /x"),
        (b"GET", b"/", "spiffe://td/web GET /"),
        (b"GET", b"/a*", None),  # it would take /ab as well
        (b"GET", b"/a%20b", None),
        (b"GET", b"/a;b", None),
        (b"GET", b"//a", None),
        (b"GET", b"*", None),
        (b"GET", b"/\xff", None),
        (b"GET", b"/a b", None),
        (b"GET", b"/a\nallow any", None),
        (b"get", b"/x", None),
        (b"GET,POST", b"/x", None),
        (b"M-SEARCH", b"/x", None),
    ],
)
def test_a_rule_for_one_request_allows_that_one(method: bytes, path: bytes, text: str | None) -> None:
    """The rule for a request allows it and no other method, path or peer; where none says that, there is none."""
    rule = rule_for(WEB.identity.name, Request(method, path))
    assert rule == text
    if rule is not None:
        policy = parse_policy([rule])
        assert decide(policy, WEB, Request(method, path)).allowed
        for peer, other in ((DEEP, Request(method, path)), (WEB, Request(b"PUT", path)), (WEB, Request(method, b"/y"))):
            assert not decide(policy, peer, other).allowed


OTHER = Ca.root()  # of the same name
BOTH = TrustBundle((ROOT.certificate, OTHER.certificate), names=("ours", "theirs"))
OURS = _peer("spiffe://td/web", bundle=BOTH)
THEIRS = _peer("spiffe://td/web", ca=OTHER, bundle=BOTH)


@pytest.mark.parametrize(
    ("rules", "ours", "theirs"),
    [
        (["web"], True, True),
        (["web by ours"], True, False),
        (["web by theirs"], False, True),
        (["any by theirs GET /x"], False, True),
        (["any by theirs /x"], False, True),
        (["any by theirs POST /x"], False, False),
        (["any by ours /y", "web by theirs"], False, True),
        (["deny any by theirs", "any"], True, False),
        (["deny web by ours", "web"], False, True),
    ],
)
def test_who_vouches(rules: list[str], ours: bool, theirs: bool) -> None:
    """A rule that names an authority means those whom it vouches for, and not who has the same name from another."""
    policy, request = parse_policy(rules, "td", BOTH.names), Request(b"GET", b"/x")
    assert (decide(policy, OURS, request).allowed, decide(policy, THEIRS, request).allowed) == (ours, theirs)


def test_a_rule_for_one_request_says_who_vouches() -> None:
    """Where authorities have names, the rule for a request allows the peer of that one alone."""
    request = Request(b"GET", b"/x")
    rule = rule_for(WEB.identity.name, request, "ours")
    assert rule == "spiffe://td/web by ours GET /x"
    policy = parse_policy([rule], authorities=BOTH.names)
    assert decide(policy, OURS, request).allowed
    assert not decide(policy, THEIRS, request).allowed
    assert str(policy.rules[0]) == f"allow {rule}"


@pytest.mark.parametrize(
    "text",
    [
        "any by",
        "any by other",
        "any by GET",
        "any by ours by theirs",
        "by ours",
        "by by ours",
        "deny by GET",
        "any by ours x",
    ],
)
def test_a_rule_by_nobody_is_refused(text: str) -> None:
    """What stands behind `by` is an authority that has a name, and stands right behind WHO."""
    with pytest.raises(InvalidInput) as refused:
        parse_rule(text, "td", BOTH.names)
    assert refused.value.reason in (Reason.INPUT_RULE, Reason.INPUT_PATTERN)


def test_a_certificate_is_meant_by_its_digest() -> None:
    """A rule with a SHA-256 means that certificate and no other."""
    policy = parse_policy([f"sha256:{WEB.names[-1].value}"])
    assert decide(policy, WEB, None).allowed
    assert not decide(policy, DEEP, None).allowed


@pytest.mark.parametrize(
    ("rule", "method", "path", "allowed"),
    [
        ("any GET", b"GET", b"/x", True),
        ("any GET", b"POST", b"/x", False),
        ("any GET", b"get", b"/x", False),
        ("any GET,HEAD", b"HEAD", b"/x", True),
        ("any /a", b"GET", b"/a", True),
        ("any /a", b"GET", b"/a/", False),
        ("any /a", b"GET", b"/A", False),
        ("any /a/*", b"GET", b"/a/b", True),
        ("any /a/*", b"GET", b"/a/b/c", False),
        ("any /a/**", b"GET", b"/a/b/c", True),
        ("any /a/**", b"GET", b"/ab", False),
        ("any POST /a/**", b"POST", b"/a/", True),
        ("any /a.b", b"GET", b"/aXb", False),
    ],
)
def test_what_is_covered(rule: str, method: bytes, path: bytes, allowed: bool) -> None:
    """Methods and paths are taken to the letter; a star stays within its segment."""
    assert decide(parse_policy([rule]), WEB, Request(method, path)).allowed is allowed


def test_the_first_rule_that_matches_decides() -> None:
    """A denial before an allowance holds, and the other way round; the decision names its rule."""
    request = Request(b"GET", b"/")
    denied = decide(parse_policy(["deny web", "any"], "td"), WEB, request)
    assert (denied.effect, str(denied.rule), denied.reason) == (
        Effect.DENY,
        "deny spiffe://td/web",
        Reason.POLICY_DENIED,
    )
    assert decide(parse_policy(["any", "deny web"], "td"), WEB, request).allowed
    assert decide(parse_policy(["deny spiffe://td/**", "web"], "td"), WEB, request).reason is Reason.POLICY_DENIED


def test_an_empty_policy_denies_everyone() -> None:
    """No rule, no entry, with a reason of its own."""
    decision = decide(Policy(()), WEB, None)
    assert (decision.allowed, decision.rule, decision.reason) == (False, None, Reason.POLICY_NO_RULE)
    assert decide(ALLOW_ANY, WEB, None).allowed


def test_rules_with_a_path_do_not_speak_of_whole_connections() -> None:
    """A TCP connection is allowed only by a rule that asks for neither method nor path."""
    assert not decide(parse_policy(["any GET", "any /x"]), WEB, None).allowed
    assert decide(parse_policy(["any GET", "any"]), WEB, None).allowed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "allow",
        "any GET /x more",
        "any get",
        "any GET,",
        "any x/y",
        "any /a?b",
        "any /a//b",
        "any /**/x",
        "any /%41",
    ],
)
def test_a_malformed_rule_is_refused(text: str) -> None:
    """What is no rule is refused with the rule's shape."""
    with pytest.raises(InvalidInput) as refused:
        parse_rule(text)
    assert refused.value.reason in (Reason.INPUT_RULE, Reason.INPUT_PATTERN)


@given(st.text(max_size=60))
def test_parsing_a_rule_is_total(text: str) -> None:
    """Any text gives a rule or InvalidInput."""
    with contextlib.suppress(InvalidInput):
        parse_rule(text, "td")


def test_a_named_identity_is_found_among_a_hundred_thousand() -> None:
    """Rules that name whole identities are looked up, not walked."""
    policy = parse_policy([f"spiffe://td/w{number}" for number in range(100_000)] + ["web"], "td")
    assert policy.others == ()
    assert decide(policy, WEB, None).allowed
    assert not decide(policy, DEEP, None).allowed
