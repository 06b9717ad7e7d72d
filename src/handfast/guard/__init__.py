"""The inbound proxy: listeners, handshakes, decisions, and the way to the app.

One-way street: bytes, handshake, VerifiedPeer, decision, upstream. Nothing behind the decision is dialled
before the decision is made.
"""
