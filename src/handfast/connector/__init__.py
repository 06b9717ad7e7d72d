"""The calling side: a plain local port that speaks mutual TLS to a far server.

It shows one credential and never falls back to plain. What goes wrong is told in words: what, whose fault, what next.
"""
