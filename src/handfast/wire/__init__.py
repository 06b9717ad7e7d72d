"""What goes over the wire, as pure functions of bytes: HTTP/1.1 framing, identity headers, TLS alerts.

Opens no socket and no file, and reads no clock.
"""
