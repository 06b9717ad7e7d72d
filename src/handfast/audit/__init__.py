"""Attacks on mutual-TLS endpoints, as a catalogue of checks; the one that runs them; and reports.

The surface, for whoever adds checks:

    model.Check       a value: id, attack, proves, severity, references, remedies, run(audit) -> Outcome, needs
    model.passed() failed() unclear() not_applicable()      outcomes, with Evidence.of(sent, received)
    runner.Audit      what `run` gets: .target .means .pace .look .baseline .deadline, and the ways to the network:
      .refused(sent, leaf, tls12=)    shake hands with a leaf that must not get in, and judge: one line is a check
      .call(leaf, request=, tls12=, flight=) -> Reply       the same without judging; .judge(sent, reply) does that
      .connect() -> Wire              a TCP connection in its turn; wires.call(wire, audit.offer(…), request) on it
      .request_for(path, *headers)    a request;  .alive()   whether the server still shakes hands
      .means.authority                a TestAuthority that the server trusts; .flawed(Flaw.X) makes bad leaves
    oracle.reach(reply, baseline)     was the application reached? oracle.worst(outcomes) folds several tries
    odd.call(audit, leaf, …) -> Reply handshakes that OpenSSL will not make, by tlslite-ng: a leaf beside a wrong key
    insider.by_authority(attack)      a check's function from one that gets an Inside: a good client and what it got;
      .judge .all_refused(leaves) .gets_in     and by_client; insider.talking(…) for several requests
    http2.ask(wire, offer, requests)  HTTP/2 requests, sound or not
    clienthello.Hello(…)              ClientHellos byte by byte; read_answer() has what the server chose

A new theme is a module with a tuple CHECKS, named in `catalogue.CHECKS`. A check needs a test against a server that
has the hole, and one against a right one (tests/audit).
"""
