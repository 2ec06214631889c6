"""How good, how cheap, how exact is it? Parity with the reference, reports."""
