"""Mutual TLS from end to end: authority, guard, and the tools around them."""

__version__ = "0.1.0"
