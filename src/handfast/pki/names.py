"""Names and the patterns that match them.

A name is one typed entry of a certificate's subject alternative name; a pattern says which names are
meant. Text from people is parsed strictly; bytes from certificates are parsed totally: an entry that no
certificate may carry becomes a name of kind FORBIDDEN, which no pattern matches.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from cryptography import x509

from handfast.errors import InvalidInput, Reason
from handfast.pki import der


class Kind(StrEnum):
    """What a name is a name of."""

    SPIFFE = "spiffe"
    DNS = "dns"
    IP = "ip"
    URI = "uri"
    EMAIL = "email"
    CN = "cn"  # the subject's common name: only ever matched by a rule that says `cn:`
    SHA256 = "sha256"  # of the leaf's DER: the certificate itself as a name
    OPAQUE = "opaque"  # a kind we do not use (otherName, directoryName, ...), carried unread
    FORBIDDEN = "forbidden"  # control bytes, or not what its kind allows


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """One typed name. SPIFFE values hold the whole `spiffe://` URI; IP values are in canonical text."""

    kind: Kind
    value: str

    def __str__(self) -> str:
        return self.value if self.kind is Kind.SPIFFE else f"{self.kind}:{self.value}"

    @property
    def trust_domain(self) -> str:
        """The trust domain of a SPIFFE ID (SPIFFE-ID 2.1); empty for any other kind."""
        return self.value[9:].partition("/")[0] if self.kind is Kind.SPIFFE else ""

    @property
    def is_uri(self) -> bool:
        """Whether it came from a URI entry."""
        return self.kind in (Kind.SPIFFE, Kind.URI)


# SPIFFE-ID 2.1 and 2.2. A `.` or `..` segment is refused below, by hand: clearer than a look-ahead.
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")
_SPIFFE_MAX = 2048  # bytes, SPIFFE-ID 2.3

# RFC 1034 3.5 with the underscore that practice allows; a wildcard is a whole left-most label (RFC 9525 6.3).
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_LABEL_CHARACTER = "[a-z0-9_-]"
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[!-~]+")
_MAILBOX = re.compile(r"[!-?A-~]+")


def parse_spiffe_id(text: str) -> Name:
    """Parse a SPIFFE ID (SPIFFE-ID 2). Raises InvalidInput (INPUT_NAME)."""
    if not text.startswith("spiffe://"):
        raise _bad_name(text, "a SPIFFE ID begins with spiffe://")
    if len(text.encode("utf-8", "replace")) > _SPIFFE_MAX:
        raise _bad_name(text[:40] + "...", f"longer than {_SPIFFE_MAX} bytes")
    domain, slash, path = text[9:].partition("/")
    if not _TRUST_DOMAIN.fullmatch(domain):
        raise _bad_name(text, "its trust domain must be of a-z 0-9 . - _")
    if slash:
        for segment in path.split("/"):
            if segment in (".", "..") or not _SEGMENT.fullmatch(segment):
                raise _bad_name(text, "its path must be of segments of a-z A-Z 0-9 . - _, none empty, '.' or '..'")
    return Name(Kind.SPIFFE, text)


def parse_trust_domain(text: str) -> str:
    """Return the trust domain `text` names (SPIFFE-ID 2.1). Raises InvalidInput (INPUT_NAME)."""
    if not _TRUST_DOMAIN.fullmatch(text):
        raise _bad_name(text, "a trust domain is of a-z 0-9 . - _")
    return text


def parse_dns(text: str) -> Name:
    """Parse a DNS name, `*.` in front allowed; lower-cased. Raises InvalidInput (INPUT_NAME)."""
    host = text.lower()
    labels = host.removeprefix("*.").split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _bad_name(text, "not a DNS name")
    return Name(Kind.DNS, host)


def parse_name(text: str, trust_domain: str | None = None) -> Name:
    """Parse a name as a person writes it. Raises InvalidInput (INPUT_NAME).

    `spiffe://…`, `dns:…`, `ip:…`, `uri:…`, `email:…`, `cn:…` say their kind. Else an IP address is
    one, `localhost` and a dotted host are DNS names, and a bare NAME is `spiffe://<trust_domain>/NAME`.
    """
    if text.startswith("spiffe://"):
        return parse_spiffe_id(text)
    prefix, colon, rest = text.partition(":")
    if colon and prefix in ("dns", "ip", "uri", "email", "cn"):
        return _parse_kind(Kind(prefix), rest, text)
    with suppress(ValueError):
        return _parse_ip(text)
    if "@" in text:
        return _parse_kind(Kind.EMAIL, text, text)
    if text.lower() == "localhost" or ("." in text and "/" not in text):
        return parse_dns(text)
    if trust_domain is None:
        raise _bad_name(text, "a bare name needs a trust domain; write spiffe://domain/name or dns:host")
    return parse_spiffe_id(f"spiffe://{trust_domain}/{text}")


def parse_san(value: bytes) -> tuple[Name, ...]:
    """Return the names in a subjectAltName extension's DER, in its order (RFC 5280 4.2.1.6).

    Total over its entries: what no certificate may carry is FORBIDDEN, what we do not use is OPAQUE.
    Raises InvalidInput (VERIFY_MALFORMED) only where the DER itself does not parse.
    """
    tag, contents = der.read_one(value)
    if tag != der.SEQUENCE:
        raise InvalidInput(Reason.VERIFY_MALFORMED, detail="its subject alternative name is no sequence")
    return tuple(_general_name(tag, entry) for tag, entry in der.read_all(contents))


def general_name(name: Name) -> x509.GeneralName:
    """Return the X.509 form of a name that may be issued. ValueError for kinds that never are."""
    match name.kind:
        case Kind.SPIFFE | Kind.URI:
            return x509.UniformResourceIdentifier(name.value)
        case Kind.DNS:
            return x509.DNSName(name.value)
        case Kind.IP:
            return x509.IPAddress(ipaddress.ip_address(name.value))
        case Kind.EMAIL:
            return x509.RFC822Name(name.value)
        case _:
            raise ValueError(f"{name} cannot be a subject alternative name")


def printable(text: str) -> bool:
    """Whether text is free of control, formatting (bidirectional, zero-width) and unassigned characters.

    Such bytes have let `admin\\0.evil` pass for `admin` (CVE-2009-2408 and its kin).
    """
    return text.isprintable()


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which names are meant. `exact` is the one name it can match, or None where it has wildcards.

    `*` stands for any run inside one path segment or DNS label; `**`, the last segment of a path or the
    first label of a DNS name, for one or more of them.
    """

    text: str
    exact: Name | None
    kind: Kind | None = None  # None: any verified peer
    regex: re.Pattern[str] | None = None
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None

    def matches(self, name: Name) -> bool:
        """Whether `name` is meant. FORBIDDEN and OPAQUE names never are, except by `any`."""
        if self.exact is not None:
            return name == self.exact
        if self.kind is None:
            return True
        if name.kind is not self.kind:
            return False
        if self.network is not None:
            return ipaddress.ip_address(name.value) in self.network
        return self.regex is not None and self.regex.fullmatch(name.value) is not None

    def __str__(self) -> str:
        return self.text


def parse_pattern(text: str, trust_domain: str | None = None) -> Pattern:
    """Parse a pattern as a person writes it. Raises InvalidInput (INPUT_PATTERN).

    `any`; or what `parse_name` takes, with `*` and `**`; or `ip:10.0.0.0/8`; or `sha256:HEX`.
    A bare NAME, wildcards and all, is taken below `spiffe://<trust_domain>/`.
    """
    if text == "any":
        return Pattern(text, None)
    prefix, colon, rest = text.partition(":")
    if prefix == "sha256" and colon:
        digest = rest.replace(":", "").lower()
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise _bad_pattern(text, "sha256: takes the 64 hex digits of the certificate's SHA-256")
        return Pattern(text, Name(Kind.SHA256, digest))
    if prefix == "ip" and "/" in rest:
        try:
            return Pattern(text, None, Kind.IP, network=ipaddress.ip_network(rest))
        except ValueError as error:
            raise _bad_pattern(text, str(error)) from None
    if "*" not in text or prefix == "cn":  # cn: is literal: a common name may hold any character
        try:
            name = parse_name(text, trust_domain)
        except InvalidInput as error:
            raise _bad_pattern(text, error.facts["detail"]) from None
        return Pattern(str(name), name)
    return _parse_glob(text, trust_domain)


def _parse_glob(text: str, trust_domain: str | None) -> Pattern:
    prefix, colon, rest = text.partition(":")
    if text.startswith("spiffe://"):
        kind, body = Kind.SPIFFE, text
    elif colon and prefix in ("dns", "uri", "email"):
        kind, body = Kind(prefix), rest
    elif "." in text and "/" not in text and "@" not in text:
        kind, body = Kind.DNS, text
    elif "@" in text:
        kind, body = Kind.EMAIL, text
    elif trust_domain is not None:
        kind, body = Kind.SPIFFE, f"spiffe://{trust_domain}/{text}"
    else:
        raise _bad_pattern(text, "a bare name needs a trust domain; write spiffe://domain/name or dns:host")
    match kind:
        case Kind.SPIFFE:
            domain = body[9:].partition("/")[0]
            if "*" in domain or not body[9:].partition("/")[2]:
                raise _bad_pattern(text, "a trust domain is written out; * belongs to the path behind it")
            _check_sample(text, parse_spiffe_id, body)
            return Pattern(body, None, kind, re.compile(_glob(text, body, "[A-Za-z0-9._-]", "/", last=True)))
        case Kind.DNS:
            body = body.lower()
            _check_sample(text, parse_dns, body)
            return Pattern(f"dns:{body}", None, kind, re.compile(_glob(text, body, _LABEL_CHARACTER, ".", last=False)))
        case Kind.EMAIL:
            local, _, domain = body.rpartition("@")
            if not local or "@" in local or "**" in body:
                raise _bad_pattern(text, "an email pattern is LOCAL@DOMAIN, with * inside either")
            _check_sample(text, lambda sample: _parse_kind(kind, sample, sample), body)
            mailbox = _glob(text, local, "[^@]", "@", last=True)
            host = _glob(text, domain.lower(), _LABEL_CHARACTER, ".", last=False)
            return Pattern(f"email:{body}", None, kind, re.compile(f"{mailbox}@{host}"))
        case _:
            if "*" in body.partition(":")[0] or not _URI.fullmatch(body):
                raise _bad_pattern(text, "a uri pattern begins with its scheme, written out")
            return Pattern(f"uri:{body}", None, kind, re.compile(_glob(text, body, "[^/?#:@%]", "/", last=True)))


def _glob(text: str, body: str, inside: str, separator: str, *, last: bool) -> str:
    """Return the regular expression of a glob whose segments of `inside` characters are joined by `separator`."""
    segments = body.split(separator)
    made = []
    for at, segment in enumerate(segments):
        if segment == "**" and at == (len(segments) - 1 if last else 0):
            made.append(f"{inside}+(?:{re.escape(separator)}{inside}+)*")
        elif "**" in segment:
            raise _bad_pattern(text, f"** stands alone, as the {'last' if last else 'first'} segment")
        elif segment == "*":
            made.append(f"{inside}+")
        else:
            made.append(_segment_glob(segment, inside))
    return re.escape(separator).join(made)


def _segment_glob(segment: str, inside: str) -> str:
    """One segment's glob. Each part but the last is taken where it comes first and never looked for again.

    That is all a glob needs, and the atomic groups keep it linear, whatever the pattern and the name.
    """
    first, *rest = (re.escape(part) for part in segment.split("*"))
    if not rest:
        return first
    middle = "".join(f"(?>{inside}*?{part})" for part in rest[:-1] if part)
    return f"{first}{middle}{inside}*{rest[-1]}"


def _check_sample(text: str, parse: Callable[[str], Name], body: str) -> None:
    """A glob is sound when it is a name of its kind with each star replaced by a letter."""
    try:
        parse(body.replace("**", "x").replace("*", "x"))
    except InvalidInput as error:
        raise _bad_pattern(text, error.facts["detail"]) from None


def _parse_kind(kind: Kind, value: str, text: str) -> Name:
    match kind:
        case Kind.DNS:
            return parse_dns(value)
        case Kind.IP:
            try:
                return _parse_ip(value)
            except ValueError:
                raise _bad_name(text, "not an IP address") from None
        case Kind.EMAIL:
            local, _, domain = value.rpartition("@")
            if not _MAILBOX.fullmatch(local) or domain.startswith("*"):
                raise _bad_name(text, "not LOCAL@DOMAIN")
            return Name(kind, f"{local}@{parse_dns(domain).value}")
        case Kind.URI:
            if value.lower().startswith("spiffe:"):
                return parse_spiffe_id(value)
            if not _URI.fullmatch(value):
                raise _bad_name(text, "not an absolute URI")
            return Name(kind, value)
        case _:
            if not value or not printable(value):
                raise _bad_name(text, "empty or not printable")
            return Name(kind, value)


def _parse_ip(text: str) -> Name:
    """ValueError for what is no address, and for one with a zone, which means something on one host only."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise ValueError("an address with a zone")
    return Name(Kind.IP, str(address))


def _general_name(tag: int, entry: bytes) -> Name:
    """RFC 5280 4.2.1.6: rfc822Name [1], dNSName [2], URI [6] are IA5String; iPAddress [7] is 4 or 16 octets."""
    match tag:
        case 0x81 | 0x82 | 0x86:
            kind = {0x81: Kind.EMAIL, 0x82: Kind.DNS, 0x86: Kind.URI}[tag]
            try:
                return _parse_kind(kind, entry.decode("ascii"), "")
            except (UnicodeDecodeError, InvalidInput):
                return Name(Kind.FORBIDDEN, f"{kind}:{_escaped(entry)}")
        case 0x87:
            if len(entry) in (4, 16):
                return Name(Kind.IP, str(ipaddress.ip_address(entry)))
            return Name(Kind.FORBIDDEN, f"ip:{entry.hex()}")
        case _:
            return Name(Kind.OPAQUE, f"{tag & 0x1F}:{entry.hex()}")


def _escaped(entry: bytes) -> str:
    return entry.decode("ascii", "backslashreplace").encode("unicode_escape").decode()


def _bad_name(value: str, detail: str) -> InvalidInput:
    return InvalidInput(Reason.INPUT_NAME, value=value, detail=detail)


def _bad_pattern(value: str, detail: str) -> InvalidInput:
    return InvalidInput(Reason.INPUT_PATTERN, value=value, detail=detail)
