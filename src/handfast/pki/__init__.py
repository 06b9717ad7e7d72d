"""Certificates without a network: names, keys, profiles, issuing, verification, revocation, PKCS#12.

Pure: it opens no socket and no file, and reads no clock, environment or random source. `now`, `serial`
and `signer` are arguments.
"""
