"""Authorization: who may do what.

Owns the policy language and the decision. Pure; it never sees an unverified peer: it takes a
VerifiedPeer, and only handfast.pki.verify makes those.
"""

from handfast.policy.rules import (
    ALLOW_ANY,
    Decision,
    Effect,
    Policy,
    Request,
    Rule,
    decide,
    decide_by,
    parse_path,
    parse_policy,
    parse_rule,
    rule_for,
    rules_about,
)

__all__ = [
    "ALLOW_ANY",
    "Decision",
    "Effect",
    "Policy",
    "Request",
    "Rule",
    "decide",
    "decide_by",
    "parse_path",
    "parse_policy",
    "parse_rule",
    "rule_for",
    "rules_about",
]
