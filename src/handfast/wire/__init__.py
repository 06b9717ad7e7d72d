"""What goes over the wire, as pure functions of bytes.

TLS records, handshake messages and alerts; HTTP/1.1 and HTTP/2; identity headers and assertions; the PROXY protocol.
Opens no socket and no file, and reads no clock.
"""
