"""Distinguished names as text (RFC 4514, and RFC 2253 before it), read from their DER, whatever is in it."""

from __future__ import annotations

from enum import Enum

from handfast.errors import InvalidInput, Reason
from handfast.pki import der


class Spelling(Enum):
    r"""How the characters `,+"\<>;` and a blank at an end are written, and what of Unicode is written as it is."""

    READABLE = "readable"  # `\,`, and all of Unicode that prints: for eyes
    ASCII = "ascii"  # `\,`, and printable ASCII alone: as OpenSSL and nginx print it
    HEX = "hex"  # `\2C`, and printable ASCII alone: no such character is in the text but between two parts


# OpenSSL's short names, which RFC 2253 and 4514 have where they name a type. Other types are given in dots.
_TYPES = {
    "2.5.4.3": "CN",
    "2.5.4.4": "SN",
    "2.5.4.5": "serialNumber",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.9": "street",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.12": "title",
    "2.5.4.13": "description",
    "2.5.4.15": "businessCategory",
    "2.5.4.16": "postalAddress",
    "2.5.4.17": "postalCode",
    "2.5.4.41": "name",
    "2.5.4.20": "telephoneNumber",
    "2.5.4.42": "GN",
    "2.5.4.43": "initials",
    "2.5.4.44": "generationQualifier",
    "2.5.4.45": "x500UniqueIdentifier",
    "2.5.4.46": "dnQualifier",
    "2.5.4.65": "pseudonym",
    "2.5.4.72": "role",
    "2.5.4.97": "organizationIdentifier",
    "1.2.840.113549.1.9.1": "emailAddress",
    "1.2.840.113549.1.9.2": "unstructuredName",
    "1.2.840.113549.1.9.8": "unstructuredAddress",
    "0.9.2342.19200300.100.1.1": "UID",
    "0.9.2342.19200300.100.1.25": "DC",
    "0.9.2342.19200300.100.1.3": "mail",
    "1.3.6.1.4.1.311.60.2.1.1": "jurisdictionL",
    "1.3.6.1.4.1.311.60.2.1.2": "jurisdictionST",
    "1.3.6.1.4.1.311.60.2.1.3": "jurisdictionC",
}
# Tags of text, and how OpenSSL reads it (ASN1_STRING_print_ex): Teletex as Latin-1, Universal as 4-byte characters.
_TEXT = {
    0x0C: "utf-8",
    0x12: "latin-1",
    0x13: "latin-1",
    0x14: "latin-1",
    0x16: "latin-1",
    0x1A: "latin-1",
    0x1C: "utf-32-be",
    0x1E: "utf-16-be",
}


def render_rdns(rdns: bytes, spelling: Spelling) -> str:
    """The contents of an RDNSequence as text, last RDN first, as OpenSSL's XN_FLAG_RFC2253 has it.

    The text is printable. Of two names that differ, the texts differ, but for the types of their strings. Raises
    InvalidInput (VERIFY_MALFORMED).
    """
    written = []
    for _, rdn in der.read_all(rdns):
        attributes = [_attribute(contents, spelling) for _, contents in der.read_all(rdn)]
        written.append("+".join(reversed(attributes)))
    return ",".join(reversed(written))


def _attribute(contents: bytes, spelling: Spelling) -> str:
    parts = list(der.read_all(contents))
    if len(parts) != 2 or parts[0][0] != der.OBJECT_IDENTIFIER:
        raise InvalidInput(Reason.VERIFY_MALFORMED, detail="a part of a name is malformed")
    oid = der.dotted(parts[0][1])
    tag, value = parts[1]
    if oid in _TYPES and tag in _TEXT:
        try:
            return f"{_TYPES[oid]}={_text(value.decode(_TEXT[tag]), spelling)}"
        except UnicodeError:
            pass
    encoded = contents[-_encoded_length(value) :]
    return f"{_TYPES.get(oid, oid)}=#{encoded.hex().upper()}"  # RFC 4514 2.4: the value's DER


def _encoded_length(value: bytes) -> int:
    """Of a DER value with its tag and length: X.690 8.1.3."""
    return 2 + len(value) + (0 if len(value) < 0x80 else (len(value).bit_length() + 7) // 8)


def _text(value: str, spelling: Spelling) -> str:
    """RFC 4514 2.4. What does not print is the hex pairs of its UTF-8."""
    written = [_character(character, spelling) for character in value]
    if written and written[-1] == " ":
        written[-1] = _escape(" ", spelling)
    if written and written[0] in (" ", "#"):
        written[0] = _escape(written[0], spelling)
    return "".join(written)


def _character(character: str, spelling: Spelling) -> str:
    if character in ',+"\\<>;':
        return _escape(character, spelling)
    if character.isprintable() and (character.isascii() or spelling is Spelling.READABLE):
        return character
    return _hex_pairs(character)


def _escape(character: str, spelling: Spelling) -> str:
    return _hex_pairs(character) if spelling is Spelling.HEX else f"\\{character}"


def _hex_pairs(character: str) -> str:
    return "".join(f"\\{octet:02X}" for octet in character.encode("utf-8"))
