"""The policy language and the decision.

    policy  = rule*                          the first rule that matches decides; none: denied
    rule    = [allow|deny] WHO [by AUTHORITY] [METHODS] [PATH]
    WHO     = a name pattern: web, spiffe://domain/web/*, dns:*.internal, email:a@b.c, cn:NAME, sha256:HEX, any
    by      = who must have vouched for it, where authorities are named; left out: any of them
    METHODS = GET,HEAD,POST,...              left out: every method; GET does not cover HEAD
    PATH    = /public, /public/*, /public/** `*` never crosses a slash; `/public/**` takes /public and all below

A path is judged on exactly the bytes that are forwarded, `A` and `a` being two. An app that takes them for one is
safe behind rules that allow, and not behind rules that deny. Rules that name a whole identity are found by
hash, so a hundred thousand of them cost what ten do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from handfast.errors import InvalidInput, Reason
from handfast.pki.names import Name, Pattern, parse_pattern
from handfast.pki.verification import VerifiedPeer

_METHODS = re.compile(r"[A-Z]+(,[A-Z]+)*")
_PATH = re.compile(r"/[!-~]*")


class Effect(StrEnum):
    """What a rule does."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked: the method and the path (without query) as forwarded."""

    method: bytes
    path: bytes


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a policy."""

    effect: Effect
    who: Pattern
    methods: frozenset[bytes] = frozenset()  # empty: every method
    path: re.Pattern[bytes] | None = None
    text: str = ""
    by: str = ""  # the authority that must vouch for the peer; '' leaves it to any

    def __str__(self) -> str:
        return self.text

    def covers(self, request: Request | None) -> bool:
        """Whether the rule speaks of this request; of a connection (None) only rules without method and path do."""
        if request is None:
            return not self.methods and self.path is None
        if self.methods and request.method not in self.methods:
            return False
        return self.path is None or self.path.fullmatch(request.path) is not None


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules in their order, indexed by the identities they name."""

    rules: tuple[Rule, ...]
    named: dict[Name, list[int]] = field(init=False, repr=False, compare=False)
    others: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # Whether any rule depends on the path: an ambiguous one must then be refused before it is judged.
    judges_paths: bool = field(init=False, repr=False, compare=False)
    # Whether any rule depends on path or method: no header may then tell the app another one.
    judges_requests: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        named: dict[Name, list[int]] = {}
        others = []
        for at, rule in enumerate(self.rules):
            if rule.who.exact is None:
                others.append(at)
            else:
                named.setdefault(rule.who.exact, []).append(at)
        object.__setattr__(self, "named", named)
        object.__setattr__(self, "others", tuple(others))
        paths, methods = [rule.path is not None for rule in self.rules], [bool(rule.methods) for rule in self.rules]
        object.__setattr__(self, "judges_paths", any(paths))
        object.__setattr__(self, "judges_requests", any(paths) or any(methods))


@dataclass(frozen=True, slots=True)
class Decision:
    """What the policy says of one request, and which rule said it."""

    effect: Effect
    rule: Rule | None  # None: no rule matched, so it is denied
    reason: Reason

    @property
    def allowed(self) -> bool:
        """Whether the request may go on."""
        return self.effect is Effect.ALLOW


def decide(policy: Policy, peer: VerifiedPeer, request: Request | None) -> Decision:
    """Return the decision of the first rule that matches; deny if none does.

    `request` None asks for a whole connection (TCP). An empty policy denies everyone. Raises nothing.
    """
    return decide_by(rules_about(policy, peer, peer.identity.authority), request)


def decide_by(rules: Iterable[Rule], request: Request | None) -> Decision:
    """Decide as `decide` does, by the rules that `rules_about` gave: they stay the same for a peer."""
    for rule in rules:
        if rule.covers(request):
            reason = Reason.POLICY_RULE_MATCHED if rule.effect is Effect.ALLOW else Reason.POLICY_DENIED
            return Decision(rule.effect, rule, reason)
    return Decision(Effect.DENY, None, Reason.POLICY_NO_RULE)


def rules_about(policy: Policy, peer: VerifiedPeer, authority: str) -> list[Rule]:
    """Return the rules that mean the peer, in their order. `authority`: who vouches for it, as rules call them now."""
    places = [at for name in peer.names for at in policy.named.get(name, ())]
    places += [at for at in policy.others if any(policy.rules[at].who.matches(name) for name in peer.names)]
    about = [policy.rules[at] for at in sorted(places)]
    return [rule for rule in about if rule.by in ("", authority)]


def rule_for(who: Name, request: Request | None, by: str = "") -> str | None:
    """The text of the rule that allows this request (None: all) and no other; None where no rule says just that.

    `by`: the authority that vouches for `who`, where authorities are named.
    """
    words = [str(who), *(("by", by) if by else ())]
    try:
        words += [] if request is None else [request.method.decode("ascii"), request.path.decode("ascii")]
        text = " ".join(words)
        rule = parse_rule(text, authorities=(by,) if by else ())
    except (UnicodeDecodeError, InvalidInput):
        return None
    exact = "*" not in text and rule.who.exact == who and rule.by == by and rule.covers(request)
    return text if exact and rule.methods == (set() if request is None else {request.method}) else None


def parse_rule(text: str, trust_domain: str | None = None, authorities: Collection[str] = ()) -> Rule:
    """Parse one rule. `authorities`: the names that may stand behind `by`.

    Raises InvalidInput (INPUT_RULE or INPUT_PATTERN).
    """
    words = text.split()
    effect = Effect.ALLOW
    if words and words[0] in (Effect.ALLOW, Effect.DENY):
        effect = Effect(words.pop(0))
    if not words or len(words) > (5 if "by" in words[1:] else 3):
        raise _bad_rule(text, "it is [allow|deny] WHO [by AUTHORITY] [METHODS] [PATH]")
    if words[0] == "by":  # someone's name, or a WHO that was forgotten
        raise _bad_rule(
            text, "WHO stands before by; a peer of that name is written with its kind, as spiffe://DOMAIN/by"
        )
    who, by = parse_pattern(words.pop(0), trust_domain), ""
    if words and words[0] == "by":
        by = " ".join(words[1:2])
        if by not in authorities:
            raise _bad_rule(text, _no_authority(by, authorities))
        del words[:2]
    methods: frozenset[bytes] = frozenset()
    if words and not words[0].startswith("/"):
        if not _METHODS.fullmatch(words[0]):
            raise _bad_rule(text, "methods are upper-case words with commas between")
        methods = frozenset(words.pop(0).encode().split(b","))
    path = parse_path(words.pop(0), text) if words else None
    if words:
        raise _bad_rule(text, "nothing may stand behind the path")
    shown = " ".join([effect, str(who), *text.split()[1 + (text.split()[0] in (Effect.ALLOW, Effect.DENY)) :]])
    return Rule(effect, who, methods, path, shown, by)


def parse_policy(lines: Iterable[str], trust_domain: str | None = None, authorities: Collection[str] = ()) -> Policy:
    """Parse rules, one a line, each as `parse_rule` does. Raises InvalidInput (INPUT_RULE or INPUT_PATTERN)."""
    return Policy(tuple(parse_rule(line, trust_domain, authorities) for line in lines))


def parse_path(path: str, text: str = "") -> re.Pattern[bytes]:
    """Return what a rule's PATH matches: whole paths, in bytes. `text` is the rule, for messages.

    Raises InvalidInput (INPUT_RULE).
    """
    text = text or path
    if not _PATH.fullmatch(path) or any(mark in path for mark in "?#%;\\"):
        raise _bad_rule(text, "a path begins with / and holds no ? # % ; or backslash")
    if "**" in path.removesuffix("/**") or "//" in path:
        raise _bad_rule(text, "** stands alone, as the last segment, and no segment is empty")
    whole = path.removesuffix("/**")
    body = re.escape(whole.encode()).replace(rb"\*", rb"[^/]*")
    if whole != path and whole.endswith("/*"):  # or /x/ would belong to /x/*/**
        body = body.removesuffix(rb"[^/]*") + rb"[^/]+"
    # What stands above all below belongs to them: many an app serves /admin as /admin/.
    below = b"" if whole == path else b"(?:/.*)?" if whole else b"/.*"
    return re.compile(body + below, re.S)


def _no_authority(name: str, authorities: Collection[str]) -> str:
    if authorities:
        return f"the authorities' names are {', '.join(authorities)}"
    name = name or "NAME"
    return (
        f"no authority is called {name}: client_ca = {{ {name} = FILE }} or --client-ca {name}=FILE gives it that name"
    )


def _bad_rule(text: str, detail: str) -> InvalidInput:
    return InvalidInput(Reason.INPUT_RULE, value=text, detail=detail)


ALLOW_ANY = Policy((parse_rule("allow any"),))
