"""A reader of DER tag-length-value, for the few places where a certificate must be read without trusting it.

`cryptography` reads whole certificates, and gives up on all extensions when one is odd. An auditor and
a verifier must still see the odd one, so names and extensions can be walked here. It reads; it never writes.
"""

from __future__ import annotations

from collections.abc import Iterator

from handfast.errors import InvalidInput, Reason

SEQUENCE = 0x30
OBJECT_IDENTIFIER = 0x06
OCTET_STRING = 0x04

_LONGEST_OID = 128  # octets; real ones have under 20, and large numbers are slow to write in decimal


def read_one(data: bytes) -> tuple[int, bytes]:
    """Return (tag, contents) of the one value that `data` holds, with nothing behind it.

    Raises InvalidInput (VERIFY_MALFORMED) on anything that is not one DER value.
    """
    values = list(read_all(data))
    if len(values) != 1:
        raise _malformed("one value was expected")
    return values[0]


def read_all(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (tag, contents) of each value in `data`, one behind the other.

    Tags above 30 and indefinite lengths are refused: X.509 uses neither (X.690 10.1, RFC 5280 4.1).
    """
    at = 0
    while at < len(data):
        tag, contents, at = _read(data, at)
        yield tag, contents


def certificate_parts(certificate_der: bytes) -> tuple[bytes, dict[str, tuple[bool, bytes]]]:
    """Return a certificate's subject (the contents of its RDNSequence) and its extensions.

    The extensions are OID in dots -> (critical, the DER inside extnValue). Raises InvalidInput.
    """
    _, certificate = read_one(certificate_der)
    fields = [field for _, tbs in list(read_all(certificate))[:1] for field in read_all(tbs)]
    if fields and fields[0][0] == 0xA0:  # version [0], absent in X.509 v1
        del fields[0]
    if len(fields) < 6:
        raise _malformed("a field is missing")
    extensions: dict[str, tuple[bool, bytes]] = {}
    for tag, contents in fields[6:]:
        if tag == 0xA3:  # extensions [3]
            for _, extension in read_all(read_one(contents)[1]):
                parts = list(read_all(extension))
                if len(parts) not in (2, 3) or parts[0][0] != OBJECT_IDENTIFIER or parts[-1][0] != OCTET_STRING:
                    raise _malformed("an extension is malformed")
                oid = dotted(parts[0][1])
                if oid in extensions:  # RFC 5280 4.2; readers would differ on which one counts
                    raise _malformed(f"the extension {oid} is there twice")
                extensions[oid] = (len(parts) == 3 and parts[1][1] != b"\x00", parts[-1][1])
    return fields[4][1], extensions


def dotted(oid: bytes) -> str:
    """Return an OBJECT IDENTIFIER's contents in dots (X.690 8.19). Raises InvalidInput (VERIFY_MALFORMED)."""
    if len(oid) > _LONGEST_OID:
        raise _malformed("an object identifier that is too long")
    arcs, value, begun = [], 0, False
    for octet in oid:
        if octet == 0x80 and not begun:
            raise _malformed("an object identifier with padding")
        value = value << 7 | octet & 0x7F
        if not octet & 0x80:
            arcs.append(value)
            value = 0
        begun = bool(octet & 0x80)
    if begun or not arcs:
        raise _malformed("an object identifier that is empty or cut off")
    first = min(arcs[0] // 40, 2)
    return ".".join(str(arc) for arc in (first, arcs[0] - 40 * first, *arcs[1:]))


def _read(data: bytes, at: int) -> tuple[int, bytes, int]:
    if at + 2 > len(data):
        raise _malformed("it ends too early")
    tag, length = data[at], data[at + 1]
    at += 2
    if tag & 0x1F == 0x1F:
        raise _malformed("a tag above 30")
    if length >= 0x80:
        octets = length & 0x7F
        if not 1 <= octets <= 4 or at + octets > len(data):
            raise _malformed("a length that is indefinite or too long")
        length = int.from_bytes(data[at : at + octets], "big")
        if length < 0x80 or data[at] == 0:  # X.690 10.1: in the fewest octets
            raise _malformed("a length in more octets than it needs")
        at += octets
    if at + length > len(data):
        raise _malformed("it ends too early")
    return tag, data[at : at + length], at + length


def _malformed(detail: str) -> InvalidInput:
    return InvalidInput(Reason.VERIFY_MALFORMED, detail=detail)
