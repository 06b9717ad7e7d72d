"""Handshakes explained: a recording and how it ended, turned into steps, a verdict, and what to do.

It judges nothing that a guard decides by, and never shows a secret: those go into a key log file that was asked for.
"""
