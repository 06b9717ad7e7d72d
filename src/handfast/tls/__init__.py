"""The only place that touches OpenSSL: contexts, handshakes over memory BIOs, refusal reasons.

It owns no socket: bytes go in and come out, so that any event loop, or a test, can carry them.
"""
