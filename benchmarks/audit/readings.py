"""What a failure means for somebody who runs that server, by check and peer ("*": of all).

Each is from the evidence of a run and the server's documents; what was tried by hand says so. "Checked" is not said
here: the run finds it out, with the settings of peers.py.
"""

_TICKETS = (
    "Only sessions that it made itself are taken, for as long as tickets and the session cache live. "
    "The documents leave resumption on, since it saves most of a handshake."
)
_KEPT = (
    "TLS judges a certificate once, at the handshake, and most servers leave it at that. "
    "A limit on how long a connection may last bounds it"
)

READINGS: dict[tuple[str, str], str] = {
    ("outsider.authority-names", "*"): "TLS sends the list before it knows who asks. It helps clients with several "
    "certificates to choose, and tells strangers the names of the authorities, nothing more.",
    ("outsider.silent-client", "stunnel"): "The limit for a handshake is TIMEOUTbusy, which is 300 s unless it is set.",
    (
        "outsider.trickling-client",
        "stunnel",
    ): "TIMEOUTbusy counts anew with every byte, so that it ends silent clients and not these.",
    ("insider.no-usage", "*"): "RFC 5280 4.2.1.12 lets a certificate without extended key usage serve every purpose, "
    "so this is by the standard. handfast asks for clientAuth, so that a server's certificate from an authority that "
    "writes no usages is no client's; --legacy-certs lets it in.",
    ("insider.weak-keys", "envoy"): "BoringSSL sets no least length for the keys in a client's chain here. An "
    "authority that issues no RSA key under 2048 bits closes it.",
    ("insider.weak-hashes", "envoy"): "BoringSSL takes SHA-1 in a client's chain here. Somebody must first find a "
    "collision with what the authority signs; one that no longer signs with SHA-1 closes it.",
    ("insider.malformed-names", "*"): "The server forwards or logs such a name, and does not compare it with anything "
    "here. It matters where a rule or the app reads names as text: a NUL or a line break may cut or split them.",
    ("insider.two-names", "*"): "TLS allows it; SPIFFE (X.509-SVID, 2) does not. It matters to an app that takes the "
    "first of them for the identity while another takes the last.",
    (
        "insider.long-chain",
        "haproxy",
    ): "OpenSSL's own limit of 100 authorities holds; we found no setting of HAProxy's for it.",
    (
        "insider.long-chain",
        "stunnel",
    ): "OpenSSL's own limit of 100 authorities holds; we found no setting of stunnel's for it.",
    ("insider.long-chain", "envoy"): "BoringSSL's limit of 100 authorities holds unless max_verify_depth is set.",
    ("insider.resumed-under-another-name", "nginx"): "By the ticket the client got to the site that the session was "
    "made for, and to no other: see `insider.resumed-elsewhere`. So no rule was passed by here.",
    ("insider.resumed-under-another-name", "haproxy"): "See `insider.resumed-elsewhere`.",
    ("insider.resumed-under-another-name", "stunnel"): "See `insider.resumed-elsewhere`.",
    ("insider.resumed-elsewhere", "haproxy"): "A client of the site in front reaches the site in back, whose "
    "authority never vouched for it. All sites of one bind line share their sessions. Without resumption it is asked "
    "for its certificate again.",
    ("insider.resumed-elsewhere", "stunnel"): "A client of the one service reaches the other, whose authority never "
    "vouched for it: services that are told apart by sni share their sessions.",
    ("insider.resumed-after-expiry", "*"): _TICKETS,
    ("insider.resumed-after-revocation", "*"): _TICKETS,
    ("insider.kept-past-expiry", "nginx"): f"{_KEPT}: keepalive_time, an hour unless it is set.",
    ("insider.kept-past-expiry", "haproxy"): f"{_KEPT}; we found none in HAProxy 2.6 for a busy connection.",
    ("insider.kept-past-expiry", "stunnel"): f"{_KEPT}; stunnel forwards bytes, and TIMEOUTidle ends idle ones alone.",
    ("insider.kept-past-expiry", "envoy"): f"{_KEPT}: max_connection_duration, which is not set by default.",
    ("insider.kept-past-revocation", "stunnel"): "A reload takes up the new list for new connections, and leaves those "
    "that are open.",
    ("insider.kept-past-revocation", "envoy"): "The new list is taken up for new connections; max_connection_duration "
    "bounds the life of the old ones.",
    ("insider.other-host", "haproxy"): "One frontend serves both sites, and nothing in the documents' recipe compares "
    "the server name with Host.",
    ("insider.other-host", "envoy"): "The filter chain is chosen by server name, and its virtual host takes any "
    "(`domains: *`). With the site's name alone Envoy answers 404 itself, without asking the app.",
    ("insider.spoofed-headers", "haproxy"): "set-header replaces a header of exactly that name. An app that folds `_` "
    "or `.` to `-`, as WSGI, CGI and PHP do, sees both.",
    ("insider.spoofed-headers", "envoy"): "Its own header is replaced. An app that folds `_` or `.` to `-` sees the "
    "client's as well. headers_with_underscores_action: REJECT_REQUEST refuses the underscores; a dot gets through.",
    (
        "insider.path-confusion",
        "nginx",
    ): "nginx resolves dots, slashes and percent-encoding before it matches. What got "
    "through are spellings that some apps resolve: `;x` behind a segment (Java) and a backslash for a slash (Windows). "
    "Our app does both. Rules that allow, with all else denied, do not depend on it.",
    (
        "insider.path-confusion",
        "haproxy",
    ): "path_beg compares the bytes that came, and our app resolves more than that. "
    "normalize-uri brings both nearer, but knows no `;` and no backslash. Rules that allow, with all else denied, do "
    "not depend on it.",
    ("insider.path-confusion", "envoy"): "A prefix match compares the bytes that came, unless normalize_path, "
    "merge_slashes and path_with_escaped_slashes_action are set, as Envoy's page on edge deployments says. `;x` behind "
    "a segment stays. Rules that allow, with all else denied, do not depend on it.",
    ("insider.smuggled-by-chunks", "envoy"): "Bytes behind the end of a chunk are passed over, and the request goes "
    "on to the app with its chunks made anew (read by hand): the app sees what Envoy saw, and nothing is smuggled. It "
    "would matter if a proxy in front of Envoy read them differently.",
    ("insider.flat-memory", "stunnel"): "Without the session cache it does not grow, so that seems to be it. The cache "
    "is bounded: 1,000 sessions, by sessionCacheSize. What happens beyond that was not looked into.",
    ("insider.brute-force", "*"): "Waiting depends on the machine: it failed three times in a row here, on two cores "
    "that the attacker shared with the server.",
    ("insider.huge-keys", "*"): "Waiting depends on the machine: it failed three times in a row here.",
    ("insider.huge-names", "*"): "Waiting depends on the machine: it failed three times in a row here.",
}
