"""PROXY headers as other programs write them."""

from __future__ import annotations

from handfast.wire.proxy import CRC32C, crc32c


def summed(header: bytes) -> bytes:
    """A header of version 2 with a checksum behind its other TLVs (doc/proxy-protocol.txt 2.2.3)."""
    length = int.from_bytes(header[14:16], "big") + 7
    zeroed = header[:14] + length.to_bytes(2, "big") + header[16:] + bytes([CRC32C, 0, 4]) + bytes(4)
    return zeroed[:-4] + crc32c(zeroed).to_bytes(4, "big")
